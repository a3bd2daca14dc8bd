"""One run of one task: what a backend is given to work with, and the only way by which it records anything."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from posttrain.synth.ledger.database import Statement
from posttrain.synth.ledger.keys import CHAT, Request, Scrubber
from posttrain.synth.ledger.pricing import Budget, usage
from posttrain.synth.ledger.replies import Verdict
from posttrain.synth.ledger.store import Ledger


@attrs.define
class Progress:
    """What a run has done so far."""

    total: int
    """Requests of the task."""
    done: int
    """Of them, those with a result, earlier runs included."""
    failed: int = 0
    """Given up in this run."""
    in_flight: int = 0
    retries: int = 0
    storms: int = 0
    """Pauses that a 429 caused."""
    input_tokens: int = 0
    """In this run."""
    output_tokens: int = 0
    cost: float | None = 0.0
    """Dollars spent on the task, earlier runs included; None if a price is not known."""
    note: str = ""
    """What the run waits for, if it waits."""
    began: float = attrs.field(factory=time.monotonic)
    first: int = 0
    """`done` when the run began."""

    @property
    def seconds_left(self) -> float | None:
        """Return the time that the rest takes at the rate so far; None before anything has come."""
        came = self.done - self.first
        return (time.monotonic() - self.began) / came * (self.total - self.done - self.failed) if came else None


@attrs.define
class Session:
    """What a backend sees of a run."""

    ledger: Ledger
    task: int
    name: str
    budget: Budget
    scrubber: Scrubber
    progress: Progress
    report: Callable[[Progress], None]
    """Called now and then with the progress."""
    wait: bool = True
    """Whether to stay until batches are finished."""
    stopping: threading.Event = attrs.field(factory=threading.Event)
    """Set when the user wants the run to end: nothing new is sent, what is in flight is waited for and kept."""
    on_stop: list[Callable[[], None]] = attrs.field(factory=list)
    """What a backend wants to be called, from any thread, when `stopping` is set."""

    def todo(self) -> Iterator[Request]:
        """Yield what has to be sent."""
        return self.ledger.todo(self.task)

    def stop(self) -> None:
        """End the run in order."""
        self.stopping.set()
        for call in self.on_stop:
            call()

    def result(
        self, request: Request, reply: dict[str, Any], content: bytes, request_id: str | None
    ) -> list[Statement]:
        """Return what records a result, and count it. The first result of a request stays."""
        tokens = usage(reply)
        micros = self.budget.cost(request.model, tokens)
        self.progress.done += 1
        self.progress.input_tokens += tokens[0]
        self.progress.output_tokens += tokens[1]
        self.budget.spent += micros or 0
        self.progress.cost = None if micros is None or self.progress.cost is None else self.budget.spent / 1e6
        values = (
            request.id,
            time.time(),
            request_id,
            content,
            *tokens,
            micros,
            finish(request, reply),
        )
        return [("INSERT OR IGNORE INTO response VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)]

    def failure(self, request: Request, said: Verdict, permanent: bool) -> list[Statement]:
        """Return what records that a request is given up, and count it."""
        self.progress.failed += 1
        message = self.scrubber.text(said.message)
        values = (request.id, time.time(), permanent, said.status, said.code, message, said.request_id)
        insert = "INSERT OR REPLACE INTO failure VALUES (?, ?, ?, ?, ?, ?, ?)"
        return [(insert, values), *self.attempt(request, said)]

    def attempt(self, request: Request, said: Verdict) -> list[Statement]:
        """Return what records one attempt that brought no result."""
        note = self.scrubber.text(said.message)
        values = (request.id, time.time(), said.status, said.code, note)
        return [("INSERT INTO attempt VALUES (?, ?, ?, ?, ?)", values)]

    def stop_message(self, said: Verdict) -> str:
        """Say why the whole task stops."""
        what = f"HTTP {said.status} {said.code}" if said.status else said.code
        return (
            f"task {self.name!r} stopped: {what}: {self.scrubber.text(said.message)}. "
            f"{self.progress.done:,} of {self.progress.total:,} results are kept; fix it and run again to go on"
        )


def finish(request: Request, reply: dict[str, Any]) -> str | None:
    """Return why the first choice of a chat ended."""
    choices = reply.get("choices") if request.endpoint.endswith(CHAT) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    reason = first.get("finish_reason") if isinstance(first, dict) else None
    return reason if isinstance(reason, str) else None


def dumped(reply: Any) -> bytes:
    """Return a reply that was read as part of something larger as bytes of its own."""
    return json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
