"""One attempt of a request: which server it goes to, and what came of it."""

import asyncio
import ssl
import time
from typing import Any, NamedTuple

import httpx

from posttrain.errors import SynthError
from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.keys import CHAT, Request
from posttrain.synth.ledger.replies import Action, Verdict, limits, verdict
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.ending import Ending
from posttrain.synth.sending.endpoints import OUTAGES, Endpoint, Endpoints
from posttrain.synth.sending.limits import Gate
from posttrain.synth.sending.service import OpenAIDialect, Service
from posttrain.synth.sending.silence import no_server
from posttrain.synth.sending.transport import exchange, hopeless, lane_transport, user_agent

Transports = dict[httpx.URL, httpx.AsyncBaseTransport]
"""The connections of a lane, by the server."""


class Sent(NamedTuple):
    """What one attempt brought."""

    said: Verdict
    reply: Any
    content: bytes

    def given_up(self, why: str) -> "Sent":
        """Return it as the last attempt of a request."""
        return self._replace(said=self.said._replace(action=Action.REFUSED, message=f"{self.said.message} ({why})"))


class Attempts:
    """Sends requests to the servers of a run."""

    def __init__(self, service: Service, session: Session, gate: Gate, ending: Ending) -> None:
        self.service, self.session, self.gate, self.ending = service, session, gate, ending
        self.loop = asyncio.get_running_loop()
        self.endpoints = Endpoints(service.urls, service.patience)
        self._context: ssl.SSLContext | None = httpx.create_ssl_context() if self.endpoints.secure else None
        form = {"accept": "application/json", "content-type": "application/json", "user-agent": user_agent()}
        self._headers = httpx.Headers({**form, **service.headers})

    async def once(self, request: Request, transports: Transports) -> Sent | None:
        """Send a request once; None if no server was there to take it: nothing was sent, and nothing counts."""
        endpoint = self.endpoints.best(self.loop.time())
        if endpoint is None:
            self.session.budget.release(request, sent=False)
            await self._wait_for_servers()
            return None
        if endpoint.base not in transports:
            transports[endpoint.base] = self.service.transport or lane_transport(endpoint.base, self._context)
        probe = endpoint.begin()
        self.session.progress.in_flight += 1
        sent = None
        try:
            sent = await self._to(endpoint, request, transports[endpoint.base])
        finally:
            endpoint.end(probe)
            self.session.progress.in_flight -= 1
            self.session.budget.release(request, sent=sent is not None)
        return sent

    async def _to(self, endpoint: Endpoint, request: Request, transport: httpx.AsyncBaseTransport) -> Sent | None:
        asked = time.monotonic()
        try:
            async with asyncio.timeout(self.service.timeout):
                response = await self._exchange(request, endpoint.base, transport)
        except httpx.ConnectError as error:
            self._unreached(endpoint, error)
            return None
        except httpx.LocalProtocolError as error:
            raise SynthError(str(error)) from None
        except TimeoutError:
            self.session.budget.charged(request)
            return Sent(Verdict(Action.RETRY, "timeout", f"no answer within {self.service.timeout:g} s"), None, b"")
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            said = Verdict(Action.RETRY, "connection", str(error) or type(error).__name__)
            return self._ill(endpoint, request, said) or Sent(said, None, b"")
        self.gate.heard(*limits(response.headers))
        reply = self.service.dialect.reply(response)
        said = verdict(response.status_code, response.headers, reply, request.endpoint.endswith(CHAT))
        if response.status_code in OUTAGES and said.action is Action.RETRY:
            return self._ill(endpoint, request, said) or Sent(said, reply, b"")
        endpoint.answered(asked)
        self.session.progress.note = ""
        own = isinstance(self.service.dialect, OpenAIDialect)
        return Sent(said, reply, response.content if own else b"")

    async def _exchange(self, request: Request, base: httpx.URL, transport: httpx.AsyncBaseTransport) -> httpx.Response:
        method, url, body = self.service.dialect.request(request, base)
        response = await exchange(transport, self.service.auth, self._request(method, url, body))
        while (further := self.service.dialect.follow(response, base)) is not None:
            await asyncio.sleep(1)
            response = await exchange(transport, self.service.auth, self._request("GET", further, b""))
        return response

    def _request(self, method: str, url: httpx.URL, body: bytes) -> httpx.Request:
        return httpx.Request(method, url, headers=self._headers, content=body or None)

    # -- servers that give no answers -------------------------------------------------

    def _unreached(self, endpoint: Endpoint, error: httpx.ConnectError) -> None:
        """Leave a server alone that takes no connection; stop the task if waiting cannot help."""
        why = self.session.scrubber.text(str(error))
        if len(self.endpoints.each) == 1 and hopeless(error) and not endpoint.silence.reached:
            said = Verdict(Action.STOP, "no_server", f"no connection to {endpoint.silence.url}: {why}")
            self.ending.bring(TaskStopped(self.session.stop_message(said)))
            return
        self.session.progress.note = f"waiting for a server: {why}"
        endpoint.eject(self.loop.time(), why, others=self.endpoints.others_answer(endpoint))

    def _ill(self, endpoint: Endpoint, request: Request, said: Verdict) -> Sent | None:
        """Return what makes a request wait with all others, if it is the server that is ill."""
        if not endpoint.is_ill(request):
            return None
        status = f"HTTP {said.status} {said.code}: " if said.status else ""
        why = self.session.scrubber.text(status + said.message)
        self.session.progress.note = f"waiting for a server: {why}"
        endpoint.eject(self.loop.time(), why, said.wait or 0.0, self.endpoints.others_answer(endpoint))
        return Sent(said._replace(action=Action.PAUSE), None, b"")

    async def _wait_for_servers(self) -> None:
        """Wait until a server may be tried again; give up the task when none has answered for long."""
        silent = [endpoint.silence for endpoint in self.endpoints.each]
        if not any(silence.left for silence in silent):
            self.ending.bring(no_server(silent, self.session))
            return
        await self.ending.sleep(min(0.5, max(0.05, self.endpoints.next_try(self.loop.time()))))
