"""Steps one after the other: what each asks is a task of the ledger, what each makes is a file of JSON lines.

Everything is a function of the rows and the ledger. So a pipeline goes on where it was stopped, sends only what is
new, and gives the same rows each time. Every row that goes no further keeps the reason.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from posttrain.blocks.data.sources import Source
from posttrain.errors import DataError, SynthError
from posttrain.interfaces import Checked, StepBlock
from posttrain.registry import name_of
from posttrain.synth.clients.client import Synth
from posttrain.synth.ledger import results
from posttrain.synth.ledger.session import Progress
from posttrain.synth.pipelines.images import held
from posttrain.synth.pipelines.report import UNDER_WAY, Report, rows_in
from posttrain.synth.pipelines.rows import Row
from posttrain.synth.pipelines.work import Work, about, client_of, others_of, wave_name


@attrs.frozen
class Pipeline:
    """Steps, made by `a | b | c`.

    >>> from posttrain.synth import Generate, Pair, Verify
    >>> pipeline = Generate(template="{question}", n=4) | Verify(function="number") | Pair()
    >>> [type(step).__name__ for step in pipeline.steps]
    ['Generate', 'Verify', 'Pair']
    """

    steps: list[StepBlock]

    def __or__(self, other: "StepBlock | Pipeline") -> "Pipeline":
        """Put a step, or the steps of another pipeline, behind these."""
        return Pipeline([*self.steps, *(other.steps if isinstance(other, Pipeline) else [other])])

    def run(
        self, rows: Source | Iterable[Row], client: Synth, task: str = "pipeline", *, max_cost: float | None = None,
        max_requests: int | None = None, wait: bool = True, retry_failed: bool = False, send: bool = True,
        progress: Callable[[Progress], None] | None = None, say: Callable[[str], None] = lambda text: None,
    ) -> Report:  # fmt: skip
        """Take the rows through all steps, and return what came of them.

        Args:
            rows: a source, or dicts of plain JSON data.
            client: where requests go; its `work_dir` holds the ledger and, in a folder of its own, what each step made.
            task: name of that folder; the tasks in the ledger are called after it.
            max_cost: dollars that all steps may cost together.
            max_requests: requests that this run may send.
            wait: stay until batches are finished; otherwise stop at the first step that is waiting for one.
            retry_failed: also send again what a server has refused for good.
            send: false stops at the first step that has something to send, and says how much.
            progress: called a few times a second while a step sends; by default a terminal shows it.
            say: called with a line about each step that sends.

        Raises:
            DataError: a row lacks what a step needs.
            SynthError: see `Synth.run`.
        """
        checked = [(n, step.check()) for n, step in enumerate(self.steps, 1) if isinstance(step, Checked)]
        wrong = [(number, f"{name}: {message}") for number, said in checked for name, message in said]
        if found := [f"step {number}: {message}" for number, message in [*wrong, *self.problems(client)]]:
            raise SynthError("\n".join(found))
        report = Report(client.work_dir / task, task)
        try:
            self._take(
                report, rows_to_begin_with(rows), client, max_cost=max_cost, max_requests=max_requests, wait=wait,
                retry_failed=retry_failed, send=send, progress=progress, say=say,
            )  # fmt: skip
        except BaseException as error:
            if report.stages:
                stage, why = report.stages[-1], str(error) or type(error).__name__
                report.unfinished = f"step {stage.number} ({stage.name}) was stopped: {why}"
                report.save()
            raise
        report.close()
        return report

    def _take(
        self, report: Report, rows: Iterator[Row], client: Synth, *, max_cost: float | None, max_requests: int | None,
        wait: bool, retry_failed: bool, send: bool, progress: Callable[[Progress], None] | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Take the rows through the steps, as far as it goes."""
        incoming = report.begin(rows)
        spent, sent = 0.0, 0
        for number, step in enumerate(self.steps, 1):
            work = Work(step, client_of(step, client), f"{report.task}.{number}", incoming)
            stage = report.stage(number, name_of(type(step)) or type(step).__name__.lower())
            while not report.unfinished and work.ask():
                stage.asked_again += work.redone
                for payer, task in work.tasks(-1):
                    bounds = {"max_cost": _left(max_cost, spent), "max_requests": _left(max_requests, sent)}
                    plan = payer.plan(task)
                    if not payer.local:
                        say(f"{number} {stage.name:<13} {'asked again: ' if work.redone else ''}{plan}")
                    if not send and plan.new:
                        report.unfinished = f"step {number} ({stage.name}) has {plan.new:,} requests to send first"
                        break
                    if send:
                        held = {} if payer.local else bounds
                        payer.run(task, **held, wait=wait, retry_failed=retry_failed, progress=progress)
                    counts = payer.status(task)
                    stage.count(counts, payer.failures(task) if counts.failed else "", payer.local)
                    spent, sent = spent + (counts.cost or 0.0), sent + (0 if payer.local else plan.new)
                    if missing := counts.total - counts.done - counts.failed:
                        waiting = f"{missing:,} requests have no result yet, {counts.waiting:,} of them are in batches"
                        report.unfinished = f"step {number} ({stage.name}): {waiting}"
                        break
            if report.unfinished:
                break
            incoming = report.write(stage, work.made())
            stage.facts = step.facts(row for row, _ in rows_in(incoming))
            report.save(UNDER_WAY)

    def problems(self, client: Synth) -> Iterator[tuple[int, str]]:
        """Yield (number of the step, what is wrong): requests that no client could send, before any is paid for."""
        for number, step in enumerate(self.steps, 1):
            try:
                for model in step.panel:
                    client_of(step, client).body(model, [], step.sent)
            except SynthError as error:
                yield number, str(error)

    def clients(self, client: Synth, task: str) -> Iterator[tuple[Synth, str]]:
        """Yield (client, task) of every step that sends."""
        for number, step in enumerate(self.steps, 1):
            if step.panel:
                known = {"": client_of(step, client), **others_of(step, client)}
                for wave in range(step.rounds + 1):
                    yield from ((one, wave_name(f"{task}.{number}", wave, whom)) for whom, one in known.items())


def _left(bound: Any, used: Any) -> Any:
    return None if bound is None else bound - used


def rows_to_begin_with(rows: Source | Iterable[Row]) -> Iterator[Row]:
    """Yield the rows to begin with, each told from what JSON cannot hold; images are text from here on."""
    folder = rows.folder if isinstance(rows, Source) else Path()
    read = ((row.values, row.place) for row, _ in rows.read(rows.open())) if isinstance(rows, Source) else (
        (row, f"row {number}") for number, row in enumerate(rows, 1)
    )  # fmt: skip
    for row, place in read:
        with about(place):
            if not isinstance(row, dict):
                raise DataError(f"a row is an object of columns, not a {type(row).__name__}")
            made = held(row, folder)
            results.line(made)
        yield made
