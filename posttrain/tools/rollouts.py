"""What a policy said in a run: prompts, replies, what each reward gave, and how much better than expected that was."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.blocks.rollouts.ledger import EVALUATIONS, ROLLOUTS, read
from posttrain.errors import RecipeError
from posttrain.words import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

LONGEST = 2_000
"""Characters of a text on the screen."""


def groups(run: Path, step: int | None, evaluations: bool) -> list[dict[str, Any]]:
    """Return the groups of one step of a run; of the last one, if none is given.

    Raises:
        RecipeError: nothing was said there.
    """
    name = EVALUATIONS if evaluations else ROLLOUTS
    found = list(read(run, name))
    steps = sorted({line["step"] for line in found})
    if not steps:
        raise RecipeError(f"{run} holds no {name}*.jsonl, which a run of `type: grpo` writes")
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        raise RecipeError(f"nothing was said in step {wanted}; there are {counted(len(steps), 'step')}, "
                          f"{steps[0]} to {steps[-1]}")  # fmt: skip
    return [line for line in found if line["step"] == wanted]


def shown(found: list[dict[str, Any]], count: int) -> "Iterator[RenderableType]":
    """Yield the first groups of a step for a terminal: the best replies first."""
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    known = [one["reward"] for line in found for one in line["replies"] if one["reward"] is not None]
    replies = sum(len(line["replies"]) for line in found)
    mean = f"mean reward {sum(known) / len(known):.4g}" if known else "no reward"
    failed = f", {replies - len(known)} failed" if len(known) < replies else ""
    said = f"{counted(len(found), 'prompt')}, {counted(replies, 'reply')}"
    yield Text(f"step {found[0]['step']}: {said}, {mean}{failed}")
    for line in found[:count]:
        yield Rule(f"prompt {line['prompt']}", align="left")
        yield Text(cut(line["text"]), "dim")
        names = list({name: None for one in line["replies"] for name in (*one["rewards"], *one["failed"])})
        table = Table(box=None, pad_edge=False, show_edge=False)
        for name in ("reward", *(names if len(names) > 1 else ()), "advantage", "tokens"):
            table.add_column(name, justify="right")
        table.add_column("reply", overflow="fold")
        for one in sorted(line["replies"], key=lambda one: -(one["reward"] if one["reward"] is not None else -1e300)):
            parts = [number(one["rewards"].get(name)) for name in names] if len(names) > 1 else []
            text = Text(cut(one["text"])) + Text("" if one["ended"] else " [cut off]", "yellow")
            for name, reason in one["failed"].items():
                text += Text(f"\n{name} failed: {reason}", "red")
            table.add_row(number(one["reward"]), *parts, number(one["advantage"]), str(len(one["ids"])), text)
        yield table


def number(value: float | None) -> str:
    """Return a number for the table."""
    return "-" if value is None else f"{value:.4g}"


def cut(text: str) -> str:
    """Return a text that fits on a screen."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} more characters)"
