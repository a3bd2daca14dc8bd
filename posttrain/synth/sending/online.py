"""Requests sent one by one, by many lanes at once, to one or several servers of the same kind.

A lane keeps its place in flight until its reply is committed. So what a crash can lose, and the next run pays for
again, is what was in flight and nothing more.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import httpx

from posttrain.errors import SynthError
from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.keys import CHAT, Request
from posttrain.synth.ledger.pricing import usage
from posttrain.synth.ledger.replies import CONFIGURED, TOO_LARGE_CODE, Action, Verdict, limits, verdict
from posttrain.synth.ledger.session import Session, Statement, dumped
from posttrain.synth.ledger.store import Writer
from posttrain.synth.sending.endpoints import OUTAGES, Endpoint, Endpoints
from posttrain.synth.sending.limits import Gate
from posttrain.synth.sending.refusals import Refusals
from posttrain.synth.sending.service import OpenAIDialect, Service
from posttrain.synth.sending.transport import exchange, hopeless, lane_transport, user_agent

log = logging.getLogger("posttrain.synth")
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
WAITS = 20
"""So often a request may be told to wait while others are answered; then it is the request, and it is given up."""
REPORT_EVERY = 0.2


class Sent(NamedTuple):
    """What one attempt brought."""

    said: Verdict
    reply: Any
    content: bytes

    def given_up(self, why: str) -> "Sent":
        """Return it as the last attempt of a request."""
        return self._replace(said=self.said._replace(action=Action.REFUSED, message=f"{self.said.message} ({why})"))


class OnlineRun:
    """Sends what a session has to send."""

    def __init__(self, service: Service, session: Session) -> None:
        self.service, self.session = service, session
        self.loop = asyncio.get_running_loop()
        self.gate = Gate(service.concurrency, service.start, service.rpm, service.tpm)
        self.endpoints = Endpoints(service.urls)
        self.refusals = Refusals(partial(session.ledger.spread, session.task))
        self.writer = Writer(session.ledger, self._committed)
        self.stopped: TaskStopped | None = None
        self._todo: Iterator[Request] = session.todo()
        self._context: ssl.SSLContext | None = None
        self._successes = 0
        self._reported = 0.0
        self._end = asyncio.Event()
        form = {"accept": "application/json", "content-type": "application/json", "user-agent": user_agent()}
        self._headers = httpx.Headers({**form, **service.headers})

    async def run(self) -> None:
        """Send everything; return when all is committed.

        Raises:
            TaskStopped: something concerns the whole task.
        """
        self.session.on_stop.append(self._stop_from_anywhere)
        if self.endpoints.secure:
            self._context = httpx.create_ssl_context()
        try:
            async with asyncio.TaskGroup() as lanes:
                for _ in range(self.service.concurrency):
                    lanes.create_task(self._lane())
        except BaseExceptionGroup as group:  # lanes turn what servers do into data; this is the disk, or a bug
            raise group.exceptions[0] from None
        finally:
            self.session.on_stop.clear()
            await asyncio.to_thread(self.writer.close)
            self.session.report(self.session.progress)
        if self.stopped is not None:
            raise self.stopped

    # -- a lane -----------------------------------------------------------------------

    async def _lane(self) -> None:
        transports: dict[httpx.URL, httpx.AsyncBaseTransport] = {}
        try:
            while not self._over and (request := self._next()) is not None:
                await self._serve(request, transports)
        finally:
            if self.service.transport is None:
                for transport in transports.values():
                    await transport.aclose()

    @property
    def _over(self) -> bool:
        return self.stopped is not None or self.session.stopping.is_set()

    def _next(self) -> Request | None:
        if self.refusals.probes:
            return self.refusals.probes.pop()
        return next((request for request in self._todo if request.id not in self.refusals.tried), None)

    async def _serve(self, request: Request, transports: dict[httpx.URL, httpx.AsyncBaseTransport]) -> None:
        """Bring one request to its end: a result, a failure, or the end of the run."""
        attempts, waits = 0, 0
        while True:
            successes = self._successes
            sent_at = await self._enter(request)
            if sent_at is None:
                return
            try:
                sent = await self._attempt(request, transports)
                if sent is None:  # the server is not there: nothing was sent, nothing counts
                    continue
                attempts += sent.said.action not in (Action.WAIT, Action.PAUSE)
                waits += sent.said.action is Action.WAIT and self._successes > successes
                if waits >= WAITS:
                    sent = sent.given_up(f"told to wait {waits} times while others were answered")
                if await self._settled(request, sent, sent_at, attempts):
                    return
            finally:
                self.gate.leave()
                self._report()
            if sent.said.action is Action.RETRY:
                backoff = random.uniform(0, min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (attempts - 1)))
                await self._sleep(max(backoff, sent.said.wait or 0.0))

    async def _enter(self, request: Request) -> float | None:
        """Wait for the turn of a request; None if the run is over."""
        sent_at = await self.gate.enter(request.tokens + request.reserve)
        while not self._over and self.session.budget.full(request):
            await self._sleep(0.05)
        if not self._over:
            try:
                self.session.budget.reserve(request)
                return sent_at
            except TaskStopped as stop:
                self._stop(stop)
        self.gate.leave()
        return None

    async def _attempt(self, request: Request, transports: dict[httpx.URL, httpx.AsyncBaseTransport]) -> Sent | None:
        """Send a request once; None if no server is there to take it."""
        now = self.loop.time()
        endpoint = self.endpoints.best(now)
        if endpoint is None:
            self.session.budget.release(request)
            self.session.budget.sent -= 1
            await self._wait_for_servers(now)
            return None
        if endpoint.base not in transports:
            transports[endpoint.base] = self.service.transport or lane_transport(endpoint.base, self._context)
        probe = endpoint.begin()
        self.session.progress.in_flight += 1
        try:
            async with asyncio.timeout(self.service.timeout):
                response = await self._exchange(request, endpoint.base, transports[endpoint.base])
        except httpx.ConnectError as error:
            if len(self.endpoints.each) == 1 and hopeless(error) and not self._successes:
                self._stop(TaskStopped(self.session.stop_message(Verdict(Action.STOP, "no_server", str(error)))))
            if endpoint.down_since is None:
                log.warning("no connection to %s; waiting for it", self.session.scrubber.text(str(error)))
            endpoint.eject(self.loop.time())
            self.session.budget.sent -= 1
            self.session.progress.note = self.session.scrubber.text(f"waiting for a server: {error}")
            return None
        except httpx.LocalProtocolError as error:
            raise SynthError(str(error)) from None
        except TimeoutError:
            self.session.budget.charged(request)
            return Sent(Verdict(Action.RETRY, "timeout", f"no answer within {self.service.timeout:g} s"), None, b"")
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            said = Verdict(Action.RETRY, "connection", str(error) or type(error).__name__)
            return self._ill(endpoint, request, said) or Sent(said, None, b"")
        finally:
            endpoint.in_flight -= 1
            endpoint.probing = endpoint.probing and not probe
            self.session.progress.in_flight -= 1
            self.session.budget.release(request)
        self.gate.heard(*limits(response.headers))
        reply = self.service.dialect.reply(response)
        said = verdict(response.status_code, response.headers, reply, request.endpoint.endswith(CHAT))
        if response.status_code in OUTAGES and said.action is Action.RETRY:
            return self._ill(endpoint, request, said) or Sent(said, reply, b"")
        endpoint.answered()
        self.session.progress.note = ""
        own = isinstance(self.service.dialect, OpenAIDialect)
        return Sent(said, reply, response.content if own else b"")

    def _ill(self, endpoint: Endpoint, request: Request, said: Verdict) -> Sent | None:
        """Return what makes a request wait with all others, if it is the server that is ill."""
        if not endpoint.outage(request, self.loop.time(), said.wait or 0.0):
            return None
        what = f"HTTP {said.status} {said.code}" if said.status else said.code
        self.session.progress.note = self.session.scrubber.text(f"waiting for a server: {what}: {said.message}")
        return Sent(said._replace(action=Action.PAUSE), None, b"")

    async def _exchange(self, request: Request, base: httpx.URL, transport: httpx.AsyncBaseTransport) -> httpx.Response:
        method, url, body = self.service.dialect.request(request, base)
        response = await exchange(transport, self.service.auth, self._request(method, url, body))
        while (further := self.service.dialect.follow(response, base)) is not None:
            await asyncio.sleep(1)
            response = await exchange(transport, self.service.auth, self._request("GET", further, b""))
        return response

    def _request(self, method: str, url: httpx.URL, body: bytes) -> httpx.Request:
        return httpx.Request(method, url, headers=self._headers, content=body or None)

    async def _wait_for_servers(self, now: float) -> None:
        """Wait until a server may be tried again; give up the task when none has answered for long."""
        if self.endpoints.silent_for(now) > self.service.patience:
            note = self.session.progress.note or "no server answers"
            said = Verdict(Action.STOP, "no_server", f"{note}, for {self.service.patience:g} s")
            self._stop(TaskStopped(self.session.stop_message(said)))
            return
        await self._sleep(min(0.5, max(0.05, self.endpoints.next_try(now))))

    # -- what came --------------------------------------------------------------------

    async def _settled(self, request: Request, sent: Sent, sent_at: float, attempts: int) -> bool:
        """Record what came of an attempt; true if the request is at its end."""
        said, session = sent.said, self.session
        if said.action is Action.RESULT:
            self._successes += 1
            self.refusals.forget()
            self.gate.succeeded()
            if self.gate.counts_tokens and any(used := usage(sent.reply)):
                self._settle(request, used)
            content = sent.content or dumped(sent.reply)
            await self._commit(session.result(request, sent.reply, content, said.request_id))
            return True
        if said.action is Action.STOP:
            await self._commit(session.attempt(request, said))
            self._stop(TaskStopped(session.stop_message(said)))
            return True
        if said.wait is not None and said.wait > self.service.patience:
            asked = f"{said.message} (it asks to wait {said.wait:,.0f} s; patience is {self.service.patience:g} s)"
            self._stop(TaskStopped(session.stop_message(said._replace(message=asked))))
            await self._commit(session.attempt(request, said))
            return True
        if said.action is Action.WAIT:
            self._storm(said, sent_at)
            return False
        if said.action is Action.PAUSE:
            session.progress.retries += 1
            await self._commit(session.attempt(request, said))
            return False
        if said.action is Action.REFUSED:
            self._settle(request, (0, 0, 0))
        if said.action is Action.RETRY and said.status is not None and said.status < 300:
            session.budget.charged(request)
        if said.action is Action.RETRY and attempts < self.service.attempts:
            session.progress.retries += 1
            await self._commit(session.attempt(request, said))
            return False
        self._count_refusal(request, said)
        permanent = said.action is Action.REFUSED and self.stopped is None and not waited_in_vain(said)
        await self._commit(session.failure(request, said, permanent))
        return True

    def _settle(self, request: Request, used: tuple[int, int, int]) -> None:
        """Give back the tokens per minute that a request has reserved and not used, by what its reply says it used."""
        self.gate.give_back(request.tokens + request.reserve - used[0] - used[1])

    def _storm(self, said: Verdict, sent_at: float) -> None:
        self.gate.storm(sent_at, said.wait)
        self.session.progress.storms = self.gate.storms
        since = self.gate.storming_since
        if since is not None and self.loop.time() - since > self.service.patience:
            message = f"{said.message} (nothing else for {self.service.patience:g} s)"
            self._stop(TaskStopped(self.session.stop_message(said._replace(message=message))))

    def _count_refusal(self, request: Request, said: Verdict) -> None:
        """Stop a task of which everything is refused for one reason. What is as a rule about the key or the model is
        sent again by the next run; anything else counts against its row, so that rows at the head block no run."""
        if said.action is not Action.REFUSED or self.stopped is not None or waited_in_vain(said):
            return
        same = self.refusals.all_alike(request, said)
        if not same:
            return
        again = "retry_failed=True sends them again"
        if said.status in CONFIGURED:
            pardon = "UPDATE failure SET permanent = 0 WHERE request = ?"
            self.writer.put([(pardon, (number,)) for number in same], None)
            again = "the next run sends them again"
        message = (
            f"{said.message} ({len(same)} requests in a row, from all over the task, were refused like this; {again})"
        )
        self._stop(TaskStopped(self.session.stop_message(said._replace(message=message))))

    def _stop(self, stop: TaskStopped) -> None:
        if self.stopped is None:
            self.stopped = stop
        self._wake_all()

    def _stop_from_anywhere(self) -> None:
        self.loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        self._end.set()
        self.gate.open_for_all()

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not longer than the run."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end.wait(), seconds)

    async def _commit(self, statements: list[Statement]) -> None:
        """Return when it is on the disk."""
        done: asyncio.Future[None] = self.loop.create_future()
        self.writer.put(statements, done)
        await done

    def _committed(self, futures: list[Any], error: Exception | None) -> None:
        def resolve() -> None:
            for future in futures:
                if future is None or future.done():
                    continue
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

        self.loop.call_soon_threadsafe(resolve)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported > REPORT_EVERY:
            self._reported = now
            self.session.report(self.session.progress)


def waited_in_vain(said: Verdict) -> bool:
    """Whether a request was given up because it was told to wait again and again: the next run tries it again."""
    return said.status == 429 and said.code != TOO_LARGE_CODE


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
