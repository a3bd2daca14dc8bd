"""See a real model learn from rewards alone: SmolLM2-135M finds out how to add, in under ten minutes on two cores."""

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import sums
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import posttrain
from posttrain.blocks.rollouts.ledger import EVALUATIONS, read
from posttrain.tools import plot

sys.path.append(str(Path(__file__).parent.parent))
FOLDER = Path("runs/demo-rl")
RECIPE = Path(__file__).parent / "recipe.yaml"
console = Console(highlight=False)


def answers(folder: Path | str, prompts: list[str]) -> list[str]:
    """Return the greedy replies of a model in a folder, by plain transformers: its next tokens up to a line's end."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for begin in range(0, len(prompts), 50):
        asked = tokenizer(prompts[begin : begin + 50], return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            ids = model.generate(**asked, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        said = tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.split("\n")[0].strip() for text in said]
    return found


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson)."""
    z, p = 1.96, right / count
    middle, half = p + z * z / 2 / count, z * math.sqrt(p * (1 - p) / count + z * z / 4 / count**2)
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def sampled(folder: Path, step: int) -> str:
    """Return the mean reward of the sampled replies of an evaluation, and its 95 % interval over prompts."""
    lines = [line for line in read(folder, EVALUATIONS) if line["step"] == step]
    each = [statistics.fmean(one["reward"] for one in line["replies"]) for line in lines]
    mean, half = statistics.fmean(each), 1.96 * statistics.stdev(each) / math.sqrt(len(each))
    return f"{mean:.1%} ({max(0, mean - half):.1%} to {mean + half:.1%})"


def comparison(rows: list[dict[str, str]], before: list[str], after: list[str], samples: list[str]) -> Table:
    """Return some answers before and after, and the share of all that are exactly right."""
    table = Table("a sum it was never asked", "before", "after", "right", box=box.SIMPLE_HEAD, pad_edge=False)
    for row, old, new in list(zip(rows, before, after, strict=True))[:8]:
        colours = ["green" if said == row["answer"] else "red" for said in (old, new)]
        table.add_row(row["prompt"].splitlines()[-1], Text(old, colours[0]), Text(new, colours[1]), row["answer"])
    table.add_section()
    shares = []
    for said in (before, after):
        right = sum(one == row["answer"] for one, row in zip(said, rows, strict=True))
        low, high = wilson(right, len(rows))
        shares.append(f"{right / len(rows):.1%} ({low:.1%} to {high:.1%})")
    table.add_row("[bold]exactly right", *shares, f"of {len(rows)}")
    table.add_row("[bold]of sampled replies", *samples, "4 to each")
    return table


def main(overrides: list[str]) -> None:
    """Make the sums, train, and compare before and after."""
    if not (FOLDER / "data" / "test.jsonl").exists():
        sums.make(FOLDER / "data")
    rows = [json.loads(line) for line in (FOLDER / "data" / "test.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows]
    if not any(override.startswith("model.name_or_path=") for override in overrides):
        from smollm2 import smollm2

        overrides = [f"model.name_or_path={smollm2()}", *overrides]
    trainer: Any = posttrain.load(RECIPE, ["resume=never", *overrides])
    before = answers(trainer.model.name_or_path, prompts)

    @posttrain.before("trainer.fit")
    def look(trainer: Any) -> None:
        trainer.evaluate()

    began = time.perf_counter()
    run = trainer.train(callbacks=[look])
    seconds = time.perf_counter() - began
    if run.status != "finished":
        sys.exit(f"stopped after {run.step} of {run.max_steps} steps: {run.stop}")
    samples = [sampled(run.output_dir, step) for step in (0, run.step)]
    console.print(comparison(rows, before, answers(run.output_dir / "huggingface", prompts), samples))
    plot.curves([run.output_dir], ["reward", "entropy"], run.output_dir / "curves.png")
    places = Table.grid(padding=(0, 2))
    places.add_row("trained in", f"{seconds:.0f} s, from {run.step * run.rows_per_step * trainer.group_size:,} replies")
    places.add_row("curves", str(run.output_dir / "curves.png"))
    places.add_row("replies", str(run.output_dir / "rollouts.jsonl"))
    places.add_row("model", str(run.output_dir / "huggingface"))
    console.print(places)


if __name__ == "__main__":
    main(sys.argv[1:])
