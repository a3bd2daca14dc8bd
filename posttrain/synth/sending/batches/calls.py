"""HTTP for batches. Reading and uploading cost nothing and are repeated when they fail.

Creating a batch costs money: its call is never repeated blindly, since no idempotency key goes over the wire.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx

from posttrain.errors import SynthError
from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.replies import Action, Verdict, parsed, verdict
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.batches.service import BatchService, Interrupted, Lost, Missing, Refused, Remote
from posttrain.synth.sending.silence import Silence, no_server
from posttrain.synth.sending.transport import hopeless, plainly, user_agent

TRIES = 8
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0


def backoff(tries: int) -> float:
    """Return the seconds to wait after so many tries."""
    longest: float = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** min(tries - 1, 8))
    return longest * random.uniform(0.5, 1)


def sendable(request: httpx.Request) -> None:
    """Refuse a header that cannot be sent, before the error of the HTTP library shows it: it may hold the key.

    Raises:
        SynthError: a header holds a character that no header can hold.
    """
    for name, value in request.headers.raw:
        if any(byte < 32 or byte == 127 for byte in value):
            raise SynthError(f"the header {name.decode()} holds a line break or another character that it cannot hold")


class Calls:
    """Calls of one run."""

    def __init__(self, service: BatchService, session: Session) -> None:
        self.service, self.session = service, session
        self.silence = Silence(service.url, service.patience)
        self._client = httpx.Client(
            base_url=service.url, auth=service.auth, params=service.query,
            headers={"user-agent": user_agent(), **service.headers},
            timeout=httpx.Timeout(service.timeout, connect=10), transport=service.transport,
            event_hooks={"request": [sendable]},
        )  # fmt: skip

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Interrupted: the run is to end.
        """
        if self.session.stopping.wait(seconds):
            raise Interrupted

    def patient(self, seconds: float, problem: str) -> float:
        """Return for how long to wait.

        Raises:
            TaskStopped: the server asks for longer than the user wants to wait.
        """
        if seconds > self.service.patience:
            raise TaskStopped(
                f"the server asks to wait {seconds:,.0f} s, and patience is {self.service.patience:g} s: "
                f"{self.session.scrubber.text(problem)}. Everything is kept; run again later, or give more patience"
            )
        return seconds

    def _sent(self, request: httpx.Request, stream: bool = False) -> httpx.Response:
        """Send a request, again and again while no server is there to take it: then nothing has been sent.

        Raises:
            NoServer: patience has ended.
            httpx.HTTPError: the connection broke: the server may have done what was asked.
        """
        tries = 0
        while True:
            asked = time.monotonic()
            try:
                response = self._client.send(request, stream=stream)
                self.silence.ends(asked)
                return response
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                why = self.session.scrubber.text(plainly(error))
                if hopeless(error) and not self.silence.reached:
                    raise TaskStopped(
                        f"no connection to {self.service.url}: {why}. Is the address right? Everything is kept"
                    ) from None
                self.silence.goes_on(why)
                if not self.silence.left:
                    raise no_server([self.silence], self.session) from None
                tries += 1
                self.pause(min(backoff(tries), self.silence.left))

    # -- calls that may be repeated ---------------------------------------------------

    def _call(self, method: str, path: str, params: dict[str, str] | None = None) -> httpx.Response:
        """Make a call that may be repeated, until it is answered."""
        waited, tries = 0.0, 0
        while True:
            try:
                response = self._sent(self._client.build_request(method, path, params=params))
                said = verdict(response.status_code, response.headers, parsed(response.content), chat=False)
                if said.action not in (Action.RETRY, Action.WAIT):
                    return response
                problem = f"HTTP {said.status} {said.code}: {said.message}"
                wait = said.wait
            except httpx.HTTPError as error:
                problem, wait = str(error) or type(error).__name__, None
            tries += 1
            waited += (pause := max(backoff(tries), self.patient(wait or 0.0, problem)))
            if tries > TRIES and waited > self.service.patience:
                raise TaskStopped(
                    f"{method} {path} failed {tries} times: {self.session.scrubber.text(problem)}. Everything is "
                    "kept; run again to go on"
                )
            self.pause(pause)

    def _json(self, method: str, path: str, params: dict[str, str] | None = None) -> Any:
        response = self._call(method, path, params)
        data = parsed(response.content)
        if response.status_code == 404:
            raise Missing(path)
        if response.status_code >= 300:
            said = self._checked(response, data)
            raise TaskStopped(f"{method} {path}: HTTP {said.status} {said.code}: {said.message}")
        return data

    def _listed(self, path: str, params: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Yield the entries of a list, page by page."""
        while True:
            page = self._json("GET", path, params)
            entries = [e for e in page.get("data") or [] if isinstance(e, dict)] if isinstance(page, dict) else []
            yield from entries
            last = entries[-1].get("id") if entries else None
            if not entries or not page.get("has_more") or not last or self._next_page(params, str(last)) == params:
                return
            params = self._next_page(params, str(last))

    def _next_page(self, params: dict[str, str], last: str) -> dict[str, str]:
        return {**params, "after": last}

    def _cancelled(self, path: str) -> None:
        """Ask for a batch to be cancelled; one that is over already is left as it is."""
        response = self._call("POST", path)
        if response.status_code >= 300 and response.status_code not in (400, 404, 409):
            self._checked(response, parsed(response.content))

    def _content(self, path: str) -> Iterator[bytes]:
        """Yield the lines of a file as they come, the last one whole or not.

        Raises:
            httpx.HTTPError: the download broke; begin again.
            Missing: there is no such file.
        """
        with closing(self._sent(self._client.build_request("GET", path), stream=True)) as response:
            if response.status_code == 404:
                raise Missing(path)
            if response.status_code >= 300:
                response.read()
                said = self._checked(response, parsed(response.content))
                raise httpx.ReadError(f"HTTP {said.status} {said.code}: {said.message}")
            rest = b""
            for chunk in response.iter_bytes(1 << 18):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from whole
            yield rest

    # -- calls that create something, and may not -------------------------------------

    def _posted(self, path: str, **content: Any) -> httpx.Response:
        """Send once what creates something.

        Raises:
            Lost: the reply did not come: look before doing it again.
            Refused: nothing was made.
        """
        try:
            response = self._sent(self._client.build_request("POST", path, **content))
        except httpx.HTTPError as error:
            raise Lost(str(error) or type(error).__name__) from None
        if response.status_code < 300:
            return response
        said = self._checked(response, parsed(response.content))
        if said.action is Action.RETRY:  # a gateway's error says nothing about what happened behind it
            raise Lost(f"HTTP {said.status} {said.code}: {said.message}")
        raise Refused(said)

    def _made(self, read: Callable[[Any], Remote], path: str, **content: Any) -> Remote:
        """Send once what makes a batch, and return what the reply says; see `_posted`. This is what costs money."""
        response = self._posted(path, **content)
        try:
            return read(parsed(response.content))
        except Missing as error:
            raise Lost(str(error)) from None

    def _checked(self, response: httpx.Response, data: Any) -> Verdict:
        """Judge an answer that is an error; stop the task if it concerns everything."""
        said = verdict(response.status_code, response.headers, data, chat=False)
        said = said._replace(message=self.session.scrubber.text(said.message))
        if said.action is Action.STOP:
            raise TaskStopped(
                f"stopped: HTTP {said.status} {said.code}: {said.message}. Everything that came is kept; fix it "
                "and run again to go on"
            )
        return said
