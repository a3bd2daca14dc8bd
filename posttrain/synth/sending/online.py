"""Requests sent one by one, by many lanes at once, to one or several servers of the same kind.

A lane keeps its place in flight until its reply is committed. So what a crash can lose, and the next run pays for
again, is what was in flight and nothing more.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.replies import Action
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.attempts import Attempts, Transports
from posttrain.synth.sending.ending import Ending
from posttrain.synth.sending.limits import Gate
from posttrain.synth.sending.outcomes import Outcomes
from posttrain.synth.sending.service import Service

FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
WAITS = 20
"""So often a request may be told to wait while others are answered; then it is the request, and it is given up."""
REPORT_EVERY = 0.2


class OnlineRun:
    """Sends what a session has to send."""

    def __init__(self, service: Service, session: Session) -> None:
        self.service, self.session = service, session
        self.gate = Gate(service.concurrency, service.start, service.rpm, service.tpm)
        self.ending = Ending(session, self.gate)
        self.attempts = Attempts(service, session, self.gate, self.ending)
        self.outcomes = Outcomes(service, session, self.gate, self.ending)
        self._todo: Iterator[Request] = session.todo()
        self._reported = 0.0

    async def run(self) -> None:
        """Send everything; return when all is committed.

        Raises:
            TaskStopped: something concerns the whole task.
        """
        try:
            async with asyncio.TaskGroup() as lanes:
                for _ in range(self.service.concurrency):
                    lanes.create_task(self._lane())
        except BaseExceptionGroup as group:  # lanes turn what servers do into data; this is the disk, or a bug
            raise group.exceptions[0] from None
        finally:
            self.session.on_stop.clear()
            await asyncio.to_thread(self.outcomes.writer.close)
            self.session.report(self.session.progress)
        if self.ending.why is not None:
            raise self.ending.why

    async def _lane(self) -> None:
        transports: Transports = {}
        try:
            while not self.ending.has_come and (request := self._next()) is not None:
                await self._serve(request, transports)
        finally:
            if self.service.transport is None:
                for transport in transports.values():
                    await transport.aclose()

    def _next(self) -> Request | None:
        refusals = self.outcomes.refusals
        if refusals.probes:
            return refusals.probes.pop()
        return next((request for request in self._todo if request.id not in refusals.tried), None)

    async def _serve(self, request: Request, transports: Transports) -> None:
        """Bring one request to its end: a result, a failure, or the end of the run."""
        attempts, waits = 0, 0
        while True:
            successes = self.outcomes.successes
            sent_at = await self._enter(request)
            if sent_at is None:
                return
            try:
                sent = await self.attempts.once(request, transports)
                if sent is None:
                    continue
                attempts += sent.said.action not in (Action.WAIT, Action.PAUSE)
                waits += sent.said.action is Action.WAIT and self.outcomes.successes > successes
                if waits >= WAITS:
                    sent = sent.given_up(f"told to wait {waits} times while others were answered")
                if await self.outcomes.settled(request, sent, sent_at, attempts):
                    return
            finally:
                self.gate.leave()
                self._report()
            if sent.said.action is Action.RETRY:
                backoff = random.uniform(0, min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (attempts - 1)))
                await self.ending.sleep(max(backoff, sent.said.wait or 0.0))

    async def _enter(self, request: Request) -> float | None:
        """Wait for the turn of a request; None if the run is over."""
        sent_at = await self.gate.enter(request.tokens + request.reserve)
        while not self.ending.has_come and self.session.budget.full(request):
            await self.ending.sleep(0.05)
        if not self.ending.has_come:
            try:
                self.session.budget.reserve(request)
                return sent_at
            except TaskStopped as stop:
                self.ending.bring(stop)
        self.gate.leave()
        return None

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported > REPORT_EVERY:
            self._reported = now
            self.session.report(self.session.progress)


def send_all(service: Service, session: Session) -> None:
    """Run the lanes in an event loop of their own, also where another one runs already (a notebook)."""

    async def work() -> None:
        await OnlineRun(service, session).run()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work())
        return
    in_thread(lambda: asyncio.run(work()))


def in_thread(work: Callable[[], None]) -> None:
    """Run something in a thread, and raise here what it raises."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
