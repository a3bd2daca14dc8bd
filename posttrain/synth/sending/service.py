"""What a server is asked, and how: its addresses and limits, and what its requests and answers look like."""

from typing import Any, Protocol

import attrs
import httpx

from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.replies import parsed


class Dialect(Protocol):
    """How a request looks on the wire, and its answer; OpenAI's way is the identity."""

    def request(self, request: Request, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return (method, URL, body)."""

    def follow(self, response: httpx.Response, base: httpx.URL) -> httpx.URL | None:
        """Return where the real answer will be, if this one only says that it will come."""

    def reply(self, response: httpx.Response) -> Any:
        """Return the answer's body in OpenAI's shape, or None if it is not readable."""


class OpenAIDialect:
    """The wire format of OpenAI, vLLM, Azure's v1 and Cortex' OpenAI-compatible path."""

    def __init__(self, query: dict[str, str] | None = None) -> None:
        self._query = query
        self._urls: dict[tuple[str, str], httpx.URL] = {}

    def request(self, request: Request, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return what to send."""
        known = (str(base), request.endpoint)
        if known not in self._urls:
            url = base.copy_with(path=base.path.rstrip("/") + request.endpoint)
            self._urls[known] = url.copy_merge_params(self._query) if self._query else url
        return "POST", self._urls[known], request.body

    def follow(self, response: httpx.Response, base: httpx.URL) -> httpx.URL | None:
        """Return None: an answer is the answer."""
        return None

    def reply(self, response: httpx.Response) -> Any:
        """Return the body as JSON."""
        return parsed(response.content)


@attrs.frozen
class Service:
    """Where requests go, and under which conditions."""

    urls: list[str]
    """Base URLs; all of them serve the same models."""
    auth: httpx.Auth
    headers: dict[str, str] = attrs.field(factory=dict)
    dialect: Dialect = attrs.field(factory=OpenAIDialect)
    concurrency: int = 64
    start: int = 16
    attempts: int = 6
    timeout: float = 600.0
    patience: float = 300.0
    rpm: float | None = None
    tpm: float | None = None
    transport: httpx.AsyncBaseTransport | None = None
