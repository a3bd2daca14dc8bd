"""The Files and Batches endpoints of OpenAI and Azure, with what their answers look like in practice made regular.

Reading and uploading cost nothing and are repeated when they fail. Creating a batch costs money: its call is never
repeated blindly, since no idempotency key goes over the wire.
"""

import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx

from posttrain.errors import SynthError
from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.keys import Scrubber
from posttrain.synth.ledger.replies import Action, Verdict, parsed, verdict
from posttrain.synth.sending.transport import hopeless, user_agent

TERMINAL = ("completed", "failed", "expired", "cancelled")
TRIES = 8
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
FAST_LIST = 100


class Lost(Exception):
    """The reply to a call that creates something did not come: it may have happened, or not."""


class Refused(Exception):
    """The server understood a call and said no; nothing has happened."""

    def __init__(self, said: Verdict) -> None:
        super().__init__(said.message)
        self.said = said


class Missing(Exception):
    """The server does not know what was asked for."""


class Interrupted(Exception):
    """The user wants the run to end."""


@attrs.frozen
class Remote:
    """A batch as the server sees it."""

    id: str
    status: str
    """`validating`, `in_progress`, `finalizing`, `cancelling`, or one of `TERMINAL`."""
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    completed: int
    failed: int
    errors: list[dict[str, Any]]
    nonce: str | None


def remote(data: Any) -> Remote:
    """Read a batch object: statuses in any case and both spellings, empty ids, missing counts.

    Raises:
        Missing: it is none.
    """
    if not isinstance(data, dict) or not isinstance(data.get("id"), str) or not data["id"]:
        raise Missing(f"not a batch: {json.dumps(data)[:200]}")
    counts = data.get("request_counts") or {}
    errors = data.get("errors") or {}
    listed = errors.get("data") if isinstance(errors, dict) else errors
    status = str(data.get("status") or "").lower()
    return Remote(
        id=data["id"],
        status={"canceled": "cancelled", "canceling": "cancelling"}.get(status, status),
        input_file_id=data.get("input_file_id") or None,
        output_file_id=data.get("output_file_id") or None,
        error_file_id=data.get("error_file_id") or None,
        completed=int(counts.get("completed") or 0),
        failed=int(counts.get("failed") or 0),
        errors=[entry for entry in listed or [] if isinstance(entry, dict)],
        nonce=(data.get("metadata") or {}).get("posttrain"),
    )


@attrs.frozen
class BatchService:
    """Where batches are made, and how."""

    url: str
    auth: httpx.Auth
    headers: dict[str, str] = attrs.field(factory=dict)
    query: dict[str, str] = attrs.field(factory=dict)
    line_prefix: str = "/v1"
    """What stands before `/chat/completions` in a line's `url` and in a batch's `endpoint`."""
    expiry: dict[str, str] = attrs.field(factory=dict)
    """Form fields of an upload that say when the file goes."""
    max_lines: int = 50_000
    max_bytes: int = 198_000_000
    """1 % below the limit of 200 MB."""
    poll_every: float = 60.0
    reconcile_after: float = 30.0
    """Seconds between two listings that must both not show a batch before it is made again."""
    max_rounds: int = 3
    """How often one run sends a request that came back without a verdict."""
    timeout: float = 600.0
    patience: float = 600.0
    transport: httpx.BaseTransport | None = None
    api: "type[BatchAPI] | None" = None
    """Its calls, if they are not those of OpenAI."""


def sendable(request: httpx.Request) -> None:
    """Refuse a header that cannot be sent, before the error of the HTTP library shows it: it may hold the key.

    Raises:
        SynthError: a header holds a character that no header can hold.
    """
    for name, value in request.headers.raw:
        if any(byte < 32 or byte == 127 for byte in value):
            raise SynthError(f"the header {name.decode()} holds a line break or another character that it cannot hold")


class BatchAPI:
    """Calls of one run."""

    def __init__(
        self, service: BatchService, scrubber: Scrubber, stopping: threading.Event, folder: Path = Path(),
        known: Callable[[str], bool] = lambda batch_id: False,
    ) -> None:  # fmt: skip
        """`folder` holds the batch files; `known` says whether a batch of the server is in the ledger."""
        self.folder, self.known = folder, known
        self.service, self._scrubber, self._stopping = service, scrubber, stopping
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
        if self._stopping.wait(seconds):
            raise Interrupted

    def patient(self, seconds: float, problem: str) -> float:
        """Return for how long to wait.

        Raises:
            TaskStopped: the server asks for longer than the user wants to wait.
        """
        if seconds > self.service.patience:
            raise TaskStopped(
                f"the server asks to wait {seconds:,.0f} s, and patience is {self.service.patience:g} s: "
                f"{self._scrubber.text(problem)}. Everything is kept; run again later, or give more patience"
            )
        return seconds

    # -- calls that may be repeated ---------------------------------------------------

    def upload(self, path: Path) -> str:
        """Upload a batch file once and return its id.

        Raises:
            Lost: the reply did not come, or is not readable.
        """
        with open(path, "rb") as file:
            form = {"purpose": "batch", **self.service.expiry}
            try:
                response = self._client.post("files", data=form, files={"file": (path.name, file, "application/jsonl")})
            except httpx.HTTPError as error:
                self._reachable(error)
                raise Lost(str(error) or type(error).__name__) from None
        data = parsed(response.content)
        if response.status_code < 300:
            if isinstance(data, dict) and isinstance(data.get("id"), str):
                return str(data["id"])
            raise Lost("the reply is not readable")
        said = self._checked(response, data)
        if said.action in (Action.RETRY, Action.WAIT):
            raise Lost(f"HTTP {said.status} {said.code}: {said.message}")
        raise Refused(said)

    def uploaded(self, name: str, size: int) -> str | None:
        """Return the id of a file that was uploaded under a name, if it is there and whole."""
        for entry in self._listed("files", {"purpose": "batch", "limit": "1000", "order": "desc"}):
            whole = entry.get("bytes") in (None, size) and str(entry.get("status")).lower() != "error"
            if entry.get("filename") == name and whole and isinstance(entry.get("id"), str):
                return str(entry["id"])
        return None

    def find(self, file_id: str, nonce: str) -> Remote | None:
        """Return the batch that was made from a file, if there is one."""
        for entry in self._listed("batches", {"limit": str(FAST_LIST)}):
            try:
                batch = remote(entry)
            except Missing:
                continue
            if batch.input_file_id == file_id or batch.nonce == nonce:
                return batch
        return None

    def get(self, batch_id: str) -> Remote:
        """Return a batch.

        Raises:
            Missing: there is none of this id.
        """
        return remote(self._json("GET", f"batches/{batch_id}"))

    def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled; one that is over already is left as it is."""
        response = self._call("POST", f"batches/{batch_id}/cancel")
        if response.status_code >= 300 and response.status_code not in (400, 404, 409):
            self._checked(response, parsed(response.content))

    def lines(self, file_id: str) -> Iterator[bytes]:
        """Yield the lines of a file as they come, the last one whole or not.

        Raises:
            httpx.HTTPError: the download broke; begin again.
            Missing: there is no such file.
        """
        return self._content(f"files/{file_id}/content")

    def _content(self, path: str) -> Iterator[bytes]:
        with self._client.stream("GET", path) as response:
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

    # -- the one call that may not ----------------------------------------------------

    def create(self, file_id: str, endpoint: str, nonce: str) -> Remote:
        """Make a batch. This is what costs money.

        Raises:
            Lost: the reply did not come or is not readable: look before doing it again.
            Refused: nothing was made.
            httpx.ConnectError: nothing was sent.
        """
        body = {
            "input_file_id": file_id, "endpoint": self.service.line_prefix + endpoint, "completion_window": "24h",
            "metadata": {"posttrain": nonce},
        }  # fmt: skip
        return self._made(remote, "batches", json=body)

    def _made(self, read: Callable[[Any], Remote], path: str, **content: Any) -> Remote:
        """Send what makes a batch, once, and return what it says; see `create`."""
        try:
            response = self._client.post(path, **content)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise
        except httpx.HTTPError as error:
            raise Lost(str(error) or type(error).__name__) from None
        data = parsed(response.content)
        if response.status_code < 300:
            try:
                return read(data)
            except Missing as error:
                raise Lost(str(error)) from None
        said = self._checked(response, data)
        if said.action is Action.RETRY:  # a gateway's error says nothing about what happened behind it
            raise Lost(f"HTTP {said.status} {said.code}: {said.message}")
        raise Refused(said)

    def _reachable(self, error: httpx.HTTPError) -> None:
        """Stop at once where waiting does not help."""
        if hopeless(error):
            what = self._scrubber.text(f"{self.service.url}: {error}")
            raise TaskStopped(f"no connection to {what}. Is the address right? Everything is kept") from None

    # -- helpers ----------------------------------------------------------------------

    def _checked(self, response: httpx.Response, data: Any) -> Verdict:
        """Judge an answer that is an error; stop the task if it concerns everything."""
        said = verdict(response.status_code, response.headers, data, chat=False)
        said = said._replace(message=self._scrubber.text(said.message))
        if said.action is Action.STOP:
            raise TaskStopped(
                f"stopped: HTTP {said.status} {said.code}: {said.message}. Everything that came is kept; fix it "
                "and run again to go on"
            )
        return said

    def _call(self, method: str, path: str, params: dict[str, str] | None = None) -> httpx.Response:
        """Make a call that may be repeated, until it is answered."""
        waited, tries = 0.0, 0
        while True:
            try:
                response = self._client.request(method, path, params=params)
                said = verdict(response.status_code, response.headers, parsed(response.content), chat=False)
                if said.action not in (Action.RETRY, Action.WAIT):
                    return response
                problem = f"HTTP {said.status} {said.code}: {said.message}"
                wait = said.wait
            except httpx.HTTPError as error:
                self._reachable(error)
                problem, wait = str(error) or type(error).__name__, None
            tries += 1
            backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** min(tries - 1, 8)) * random.uniform(0.5, 1)
            waited += (pause := max(backoff, self.patient(wait or 0.0, problem)))
            if tries > TRIES and waited > self.service.patience:
                raise TaskStopped(
                    f"{method} {path} failed {tries} times: {self._scrubber.text(problem)}. Everything is kept; run "
                    "again to go on"
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
