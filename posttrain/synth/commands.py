"""`posttrain synth run | plan | status | cancel | export | errors`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.errors import SynthError
from posttrain.synth.recipe import SynthRecipe, load
from posttrain.synth.session import Progress


def run(arguments: argparse.Namespace, made: SynthRecipe) -> int:
    """Send what is missing, show how it goes, and write the output."""
    made.add()
    say(str(made.synth.plan(made.task)))
    try:
        with _live() as progress:
            counts = made.synth.run(
                made.task, max_cost=arguments.max_cost, max_requests=arguments.max_requests,
                retry_failed=arguments.retry_failed, wait=not arguments.no_wait, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        print(f"{stop}\nto go on: posttrain synth run {arguments.recipe}", file=sys.stderr)  # noqa: T201
        return 130
    say(_standing(counts))
    if counts.waiting:
        say(f"to take in what is under way: posttrain synth run {arguments.recipe}")
        return 0
    if made.output:
        say(f"{made.export(made.output):,} conversations in {made.output}")
    if counts.failed:
        raise SynthError(made.synth.failures(made.task))
    return 0


def plan(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Say what a run would send."""
    made.add()
    say(str(made.synth.plan(made.task)))


def status(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Say how a task stands by the ledger, also while another process runs it."""
    ledger = _read_only(made)
    say(_standing(ledger.counts(ledger.find(made.task))))
    query = """SELECT coalesce(b.batch_id, b.nonce), b.state, coalesce(b.status, ''), b.lines, coalesce(b.completed, 0)
        FROM batch b JOIN task t ON t.id = b.task WHERE t.name = ? ORDER BY b.id"""
    for name, state, said, lines, completed in ledger.all(query, made.task):
        say(f"  {name}  {state:<10} {said:<12} {completed:,} of {lines:,}")


def errors(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """List what has no result, by reason."""
    ledger = _read_only(made)
    found = ledger.errors(ledger.find(made.task))
    for code, message, number, final in found:
        say(f"{number:>8,}  {code:<28} {'refused' if final else 'given up'}  {message}")
    if not found:
        say("no failures")


def cancel(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Cancel the batches of a task."""
    asked = made.synth.cancel(made.task)
    say(
        f"asked to end: {', '.join(asked)}; `posttrain synth run` takes in what they finished"
        if asked
        else "nothing is under way"
    )


def export(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Write the conversations of a task."""
    path: Path | None = arguments.output or made.output
    if path is None or path.suffix not in (".jsonl", ".parquet"):
        raise SynthError("say where to: -o FILE.jsonl or -o FILE.parquet")
    say(f"{made.export(path):,} conversations in {path}")


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, SynthRecipe], Any], str]] = {
    "run": (run, "send what has no result yet, and write the output; the same command goes on"),
    "plan": (plan, "say what a run would send, and what it may cost"),
    "status": (status, "say how the task stands"),
    "errors": (errors, "list what has no result, by reason"),
    "cancel": (cancel, "cancel its batches"),
    "export": (export, "write its conversations for the trainers"),
}


def main(arguments: argparse.Namespace) -> int:
    """Run one of the commands."""
    made = load(arguments.recipe, arguments.overrides)
    return int(COMMANDS[arguments.verb][0](arguments, made) or 0)


def say(text: str) -> None:
    """Print to standard output."""
    print(text)  # noqa: T201


def _read_only(made: SynthRecipe) -> Any:
    from posttrain.synth.ledger import Ledger

    return Ledger(made.synth.work_dir, read_only=True)


def _standing(counts: Any) -> str:
    cost = "cost unknown" if counts.cost is None else f"${counts.cost:.4f}"
    left = counts.total - counts.done - counts.failed - counts.waiting
    return (
        f"{counts.done:,} of {counts.total:,} done, {counts.failed:,} failed, {counts.waiting:,} under way, "
        f"{left:,} not sent; {counts.input_tokens:,} + {counts.output_tokens:,} tokens, {cost}"
    )


class _live:
    """One line that shows how a run goes, on a terminal; nothing elsewhere."""

    def __enter__(self) -> Callable[[Progress], None]:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(stderr=True)
        self._live = Live(Text(""), console=console, refresh_per_second=4) if console.is_terminal else None
        if self._live is None:
            return lambda progress: None
        live = self._live
        live.start()
        return lambda progress: live.update(Text(_line(progress)))

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()


def _line(progress: Progress) -> str:
    left = progress.seconds_left
    parts = [
        f"{progress.done:,}/{progress.total:,} done", f"{progress.failed:,} failed",
        f"{progress.in_flight:,} in flight",
        f"{progress.input_tokens + progress.output_tokens:,} tokens",
        "cost unknown" if progress.cost is None else f"${progress.cost:.4f}",
        "" if left is None else f"{left:,.0f} s left", progress.note,
    ]  # fmt: skip
    return "  ".join(part for part in parts if part)
