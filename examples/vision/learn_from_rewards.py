"""A model that has half learned to see goes on from rewards alone: exact answers to questions about pictures.

120 steps on answers that were written down, then GRPO, which is told of each of its own answers whether it is right.
"""

import json
import sys
import time
from pathlib import Path

import figures
import learn_to_see as seeing
from rich import box
from rich.table import Table

import posttrain

RECIPE = Path(__file__).parent / "rewards.yaml"


def main(half: list[str], rewards: list[str], pictures: int = 4000) -> list[float]:
    """Train both, and show what they say about held-out pictures; return the shares of right answers of all."""
    data = seeing.FOLDER / "data"
    if not (data / "model").exists():
        figures.make(data)
    for name, seed, count in (("questions", 3, pictures), ("held-out", 4, min(300, pictures))):
        rows = figures.prompts(seed, count)
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seeing.train(["max_steps=120", *half, f"output_dir={seeing.FOLDER / 'half'}"])
    begin = time.perf_counter()
    posttrain.load(RECIPE, rewards).train()
    seconds = time.perf_counter() - begin
    asked, totals = seeing.questions(400), []
    title = "exactly right, of all questions about 400 held-out pictures"
    table = Table(title, *seeing.KINDS, "all", box=box.SIMPLE_HEAD, pad_edge=False)
    for label, name in {"after 120 steps on answers": "half", "and from rewards": "rewards"}.items():
        found = seeing.shares(asked, seeing.answers(seeing.FOLDER / name / "huggingface", asked))
        table.add_row(label, *(f"{share:.1%}" for share in found))
        totals.append(found[-1])
    seeing.console.print(table)
    seeing.console.print(f"learned from rewards in {seconds:.0f} s")
    return totals


if __name__ == "__main__":
    main([], sys.argv[1:])
