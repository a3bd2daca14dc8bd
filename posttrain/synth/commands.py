"""`posttrain synth run | plan | status | errors | cancel | export | view`."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import SynthError
from posttrain.synth.ledger.live import shown
from posttrain.synth.ledger.session import Progress
from posttrain.synth.pipelines.recipe import SynthRecipe, load

Progressing = Callable[[Progress], None]


def run(arguments: argparse.Namespace, made: SynthRecipe) -> int:
    """Take the rows through the steps, send what is missing, show how it goes, and write the output."""
    from rich.console import Console

    if arguments.first:
        return first(arguments, made)
    try:
        with shown() as progress, live(arguments.live, made, progress) as progress:
            report = made.pipeline.run(
                made.source, made.synth, made.task, max_cost=arguments.max_cost, max_requests=arguments.max_requests,
                retry_failed=arguments.retry_failed, wait=not arguments.no_wait, progress=progress, say=say,
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        print(f"{stop}\nto go on: posttrain synth run {arguments.recipe}", file=sys.stderr)  # noqa: T201
        return 130
    Console().print(report.table())
    if report.unfinished:
        say(f"{report.unfinished}; to go on: posttrain synth run {arguments.recipe}")
        return 0
    for line in made.export(report):
        say(line)
    say(f"to look at it: posttrain synth view {arguments.recipe}")
    if report.failed:
        raise SynthError("\n".join(stage.trouble for stage in report.stages if stage.trouble))
    return 0


@contextmanager
def live(file: Path | None, made: SynthRecipe, progress: Progressing) -> Iterator[Progressing]:
    """Yield what is to be called with the progress; with a file, it writes a page there."""
    if file is None:
        yield progress
        return
    from posttrain.synth.pipelines.live_page import LivePage

    page = LivePage(file, made.folder, progress)
    say(f"to watch it: {file.absolute().as_uri()}")
    try:
        yield page
    finally:
        page.write("The run is over.")


def first(arguments: argparse.Namespace, made: SynthRecipe) -> int:
    """Take the first rows through the steps; show what is asked, what comes back, and what all would cost."""
    from rich.console import Console

    from posttrain.synth.pipelines.preview import preview

    with shown() as progress:
        found = preview(
            made.pipeline, made.source, made.synth, made.task, arguments.first, max_cost=arguments.max_cost,
            max_requests=arguments.max_requests, retry_failed=arguments.retry_failed, progress=progress, say=say,
        )  # fmt: skip
    for line in found.lines():
        say(line)
    Console().print(found.report.table())
    say(f"nothing was exported; to look at it: posttrain synth view {found.report.folder}")
    say(f"to run it all, these rows at no further cost: posttrain synth run {arguments.recipe}")
    return 1 if found.report.failed else 0


def plan(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Say what the first step that has something to send would send."""
    report = made.pipeline.run(made.source, made.synth, made.task, send=False, say=say)
    if report.unfinished:
        say(f"{report.unfinished}; what later steps send depends on the replies")


def status(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Say how the tasks stand by the ledger, also while another process runs them."""
    from posttrain.synth.ledger.standing import counts

    ledger = _read_only(made)
    for task in _tasks(ledger, made):
        say(f"{task}: {_standing(counts(ledger, ledger.find(task)))}")
        query = """SELECT coalesce(b.batch_id, b.nonce), b.state, coalesce(b.status, ''), b.lines,
            coalesce(b.completed, 0) FROM batch b JOIN task t ON t.id = b.task WHERE t.name = ? ORDER BY b.id"""
        for name, state, said, lines, completed in ledger.all(query, task):
            say(f"  {name}  {state:<10} {said:<12} {completed:,} of {lines:,}")


def errors(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """List what has no result, by reason."""
    from posttrain.synth.ledger import standing

    ledger = _read_only(made)
    found = [(task, *row) for task in _tasks(ledger, made) for row in standing.errors(ledger, ledger.find(task))]
    for task, code, message, number, final in found:
        say(f"{task}  {number:>8,}  {code:<28} {'refused' if final else 'given up'}  {message}")
    if not found:
        say("no failures")


def cancel(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Cancel the batches of all tasks."""
    asked = [
        batch for client, task in made.pipeline.clients(made.synth, made.task)
        if client.batched and task in client.ledger.tasks() for batch in client.cancel(task)
    ]  # fmt: skip
    say(
        f"asked to end: {', '.join(asked)}; `posttrain synth run` takes in what they finished"
        if asked
        else "nothing is under way"
    )


def export(arguments: argparse.Namespace, made: SynthRecipe) -> None:
    """Write the rows that came out of the last step, or those that were dropped."""
    from posttrain.synth.pipelines.report import Report

    path: Path | None = arguments.output or (made.dropped if arguments.dropped else made.output)
    if path is None or path.suffix not in (".jsonl", ".parquet"):
        raise SynthError("say where to: -o FILE.jsonl or -o FILE.parquet")
    say(f"{Report.load(made.folder).export(path, arguments.dropped):,} rows in {path}")


def view(arguments: argparse.Namespace, made: SynthRecipe | None) -> None:
    """Write a page to look at."""
    from posttrain.synth.pipelines.report import Report
    from posttrain.synth.pipelines.view import page

    folder: Path = made.folder if made else arguments.recipe
    target = arguments.output or folder / "view.html"
    target.write_text(page(Report.load(folder)), encoding="utf-8")
    say(str(target))


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, Any], Any], str]] = {
    "run": (run, "take the rows through the steps, and write the output; the same command goes on"),
    "plan": (plan, "say what a run would send, and what it may cost"),
    "status": (status, "say how its tasks stand"),
    "errors": (errors, "list what has no result, by reason"),
    "cancel": (cancel, "cancel its batches"),
    "export": (export, "write the rows for the trainers, or with --dropped what was dropped and why"),
    "view": (view, "write a page to look at: what came of the rows, scores, pairs; takes the folder of a run, too"),
}


def main(arguments: argparse.Namespace) -> int:
    """Run one of the commands."""
    is_folder = arguments.verb == "view" and arguments.recipe.is_dir()
    made = None if is_folder else load(arguments.recipe, arguments.overrides)
    return int(COMMANDS[arguments.verb][0](arguments, made) or 0)


def say(text: str) -> None:
    """Print to standard output."""
    print(text)  # noqa: T201


def _read_only(made: SynthRecipe) -> Any:
    from posttrain.synth.ledger.store import Ledger

    return Ledger(made.synth.work_dir, read_only=True)


def _tasks(ledger: Any, made: SynthRecipe) -> list[str]:
    return [task for task in ledger.tasks() if task.rpartition(".")[0] == made.task]


def _standing(counts: Any) -> str:
    cost = "cost unknown" if counts.cost is None else f"${counts.cost:.4f}"
    left = counts.total - counts.done - counts.failed - counts.waiting
    return (
        f"{counts.done:,} of {counts.total:,} done, {counts.failed:,} failed, {counts.waiting:,} under way, "
        f"{left:,} not sent; {counts.input_tokens:,} + {counts.output_tokens:,} tokens, {cost}"
    )
