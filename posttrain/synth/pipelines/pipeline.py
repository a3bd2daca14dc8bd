"""Steps one after the other: what each asks is a task of the ledger, what each makes is a file of JSON lines.

Everything is a function of the rows and the ledger. So a pipeline goes on where it was stopped, sends only what is
new, and gives the same rows each time. Every row that goes no further keeps the reason.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from posttrain.blocks.data.sources import Source
from posttrain.errors import DataError, SynthError
from posttrain.interfaces import Checked, StepBlock
from posttrain.registry import name_of
from posttrain.synth.clients.client import Synth
from posttrain.synth.ledger import results
from posttrain.synth.ledger.keys import CHAT, canonical, in_order
from posttrain.synth.ledger.session import Progress
from posttrain.synth.pipelines.report import Report, rows_in
from posttrain.synth.pipelines.rows import Chat, Drop, Reply, Row


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
            while asked := work.ask():
                task, again = work.tasks[-1], len(work.tasks) > 1
                plan = work.client.plan(task)
                say(f"{number} {stage.name:<13} {'asked again: ' if again else ''}{plan}")
                if not send and plan.new:
                    report.unfinished = f"step {number} ({stage.name}) has {plan.new:,} requests to send first"
                    break
                if send:
                    bounds = {"max_cost": _left(max_cost, spent), "max_requests": _left(max_requests, sent)}
                    work.client.run(task, **bounds, wait=wait, retry_failed=retry_failed, progress=progress)
                counts = work.client.status(task)
                stage.count(counts, work.client.failures(task) if counts.failed else "")
                stage.asked_again += asked if again else 0
                spent, sent = spent + (counts.cost or 0.0), sent + plan.new
                if missing := counts.total - counts.done - counts.failed:
                    waiting = f"{missing:,} requests have no result yet, {counts.waiting:,} of them are in batches"
                    report.unfinished = f"step {number} ({stage.name}): {waiting}"
                    break
            if report.unfinished:
                break
            incoming = report.write(stage, work.made())
            stage.facts = step.facts(row for row, _ in rows_in(incoming))

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
                for again in range(step.rounds + 1):
                    yield client_of(step, client), again_name(f"{task}.{number}", again)


@attrs.define
class Work:
    """One step at work on the rows in a file."""

    step: StepBlock
    client: Synth
    """Where its requests go."""
    task: str
    incoming: Path
    tasks: list[str] = attrs.field(factory=list)
    """In the ledger: of what was asked first, then of what was asked again."""

    def ask(self) -> int:
        """Add what the step asks, or then what it asks again, to a task of its own; return how many requests it is."""
        if len(self.tasks) > self.step.rounds:
            return 0
        name, count = again_name(self.task, len(self.tasks)), 0
        self.client.begin_batch_task(name)
        for chat in self.wanted():
            self.client.add_request_to_batch_task(name, chat.endpoint, self.body(chat))
            count += 1
        if count:
            self.tasks.append(name)
        return count

    def wanted(self) -> Iterator[Chat]:
        """Yield what is to be asked next."""
        if not self.tasks:
            for row, place in rows_in(self.incoming):
                with _about(place):
                    yield from self.step.chats(row)
            return
        for _, _, pairs in self.answered():
            for chat, reply in pairs:
                if (again := self.step.again(chat, reply)) is not None:
                    yield again

    def body(self, chat: Chat) -> dict[str, Any]:
        """Return the body of a request."""
        if chat.endpoint == CHAT:
            return self.client.body(chat.model, chat.messages, chat.body)
        return {"model": chat.model, "messages": chat.messages, **chat.body}

    def made(self) -> Iterator[Row | Drop]:
        """Yield what the step makes of the rows."""
        dropped: list[Drop] = []

        def passed() -> Iterator[Row]:
            for made in self.folded():
                if isinstance(made, Drop):
                    dropped.append(made)
                else:
                    yield made

        for made in self.step.table(passed()):
            yield from dropped
            dropped.clear()
            yield made
        yield from dropped

    def folded(self) -> Iterator[Row | Drop]:
        """Yield what becomes of each row by itself, given the replies to what was asked about it."""
        for row, place, pairs in self.answered():
            with _about(place):
                yield from self.step.fold(row, [reply for _, reply in pairs])

    def answered(self) -> Iterator[tuple[Row, str, list[tuple[Chat, Reply]]]]:
        """Yield each row, its place, and what was asked about it last with the reply to that."""
        ledger = self.client.ledger
        first, *later = [results.answers(ledger, ledger.find(name), name) for name in self.tasks] or [iter(())]
        for row, place in rows_in(self.incoming):
            with _about(place):
                pairs = []
                for chat in self.step.chats(row):
                    reply = self.reply(chat, next(first, None))
                    for answers in later:
                        again = self.step.again(chat, reply)
                        if again is None:
                            break
                        chat, reply = again, self.reply(again, next(answers, None))
                    pairs.append((chat, reply))
            yield row, place, pairs

    def reply(self, chat: Chat, answer: Any) -> Reply:
        """Return the reply to a request, which must be the very one that was sent.

        Raises:
            SynthError: it is not: the step's `chats` gave other requests than before.
        """
        if answer is None or answer[0] != chat.endpoint or not _same(answer[1], self.body(chat)):
            raise SynthError(
                f"{type(self.step).__name__}.chats() gave another request than when it was sent. It must be a function "
                "of the row alone: no clock, no random numbers without a seed, no changing the row"
            )
        response = answer[2]
        return Reply((response["response"] or {}).get("body"), response["error"])


def again_name(task: str, number: int) -> str:
    """Return the name of the task of what is asked for the n-th time again."""
    return f"{task}+{number}" if number else task


def client_of(step: StepBlock, home: Synth) -> Synth:
    """Return where a step's requests go: all clients of a pipeline keep them in one ledger."""
    own = getattr(step, "client", None)
    if own is None:
        return home
    if not isinstance(own, Synth):
        raise SynthError(f"client: {type(own).__name__} is no client of posttrain.synth")
    return attrs.evolve(own, work_dir=home.work_dir)


def _same(sent: bytes, body: dict[str, Any]) -> bool:
    """Whether a body is the one that was sent, also if version 0.1 sent it with its keys in another order."""
    wanted = canonical(in_order(body))
    return sent == wanted or canonical(in_order(json.loads(sent))) == wanted


def _left(bound: Any, used: Any) -> Any:
    return None if bound is None else bound - used


def rows_to_begin_with(rows: Source | Iterable[Row]) -> Iterator[Row]:
    """Yield the rows to begin with, each told from what no file of JSON lines can hold."""
    read = ((row.values, row.place) for row, _ in rows.read(rows.open())) if isinstance(rows, Source) else (
        (row, f"row {number}") for number, row in enumerate(rows, 1)
    )  # fmt: skip
    for row, place in read:
        with _about(place):
            if not isinstance(row, dict):
                raise DataError(f"a row is an object of columns, not a {type(row).__name__}")
            results.line(row)
        yield row


@contextmanager
def _about(place: str) -> Iterator[None]:
    """Say which row an error is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
