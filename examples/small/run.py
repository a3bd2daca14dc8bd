"""Run every recipe of this folder, one after the other, and print what each learned: about six minutes on two cores."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from posttrain.tools import plot
from posttrain.words import duration

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "demo"))
import make_data  # noqa: E402

FOLDER = Path("runs/small")
RECIPES = ["base", "lora", "reward", "distill", "streaming", "two_ranks", "unlikelihood", "lion"]


def make(folder: Path) -> None:
    """Write chats about two skills and about the third, pairs of right and wrong answers, and the shape of a model."""
    make_data.make(folder)
    draw = random.Random(0)
    for split, end in (("train", ""), ("test", "_test")):
        chats = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        third = [chat for chat in chats if "Sort" in make_data.question_of(chat)]
        two = [chat for chat in chats if "Sort" not in make_data.question_of(chat)]
        pairs = [pair for chat in chats[:4000] if (pair := against(chat, draw))]
        for name, rows in (("two_skills", two), ("third_skill", third), ("pairs", pairs)):
            (folder / f"{name}{end}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def against(chat: dict, draw: random.Random) -> dict | None:
    """Return a pair of the right answer and one with its letters in another order, if there is one."""
    question, answer = chat["messages"]
    letters = "".join(draw.sample(answer["content"], len(answer["content"])))
    if letters == answer["content"]:
        return None
    return {"prompt": [question], "chosen": [answer], "rejected": [{**answer, "content": letters}]}


def main(overrides: list[str]) -> None:
    """Run the recipes in processes of their own, as a user would."""
    if not (FOLDER / "data").exists():
        make(FOLDER / "data")
    table = Table("recipe", "held-out loss, first evaluation", "last", "accuracy", "time", box=box.SIMPLE_HEAD)
    for name in RECIPES:
        began = time.time()
        command = [
            sys.executable,
            "-m",
            "posttrain.cli",
            "train",
            str(HERE / f"{name}.yaml"),
            "resume=never",
            *overrides,
        ]
        subprocess.run(command, check=True)
        rows = [json.loads(line) for line in (FOLDER / name / "metrics.jsonl").read_text().splitlines()]
        found = [row for row in rows if "eval_loss" in row]
        accuracy = found[-1].get("eval_accuracy", found[-1].get("eval_rewards/accuracy"))
        table.add_row(name, f"{found[0]['eval_loss']:.3f}", f"{found[-1]['eval_loss']:.3f}",
                      "" if accuracy is None else f"{accuracy:.1%}", duration(time.time() - began))  # fmt: skip
    Console().print(table)
    target = FOLDER / "curves.png"
    plot.curves([FOLDER / name for name in RECIPES[1:] if name != "reward"], ["eval_loss"], target)
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
