"""Requests one at a time to interfaces other than OpenAI's: translated on their way, and so are the answers."""

import json
from collections.abc import Callable
from typing import Any

import attrs
import httpx

from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.replies import parsed


@attrs.frozen
class Translated:
    """How such an interface is asked; see `Dialect` in service.py."""

    path: Callable[[str], str]
    """Name of a model -> the path behind the base URL, with what must be quoted quoted."""
    to_wire: Callable[[dict[str, Any]], dict[str, Any]]
    """A chat in OpenAI's shape -> its request."""
    from_wire: Callable[[Any], Any]
    """Its answer -> a chat completion."""

    def request(self, request: Request, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return what to send."""
        url = base.copy_with(path=base.path.rstrip("/") + self.path(request.model))
        return "POST", url, json.dumps(self.to_wire(json.loads(request.body)), ensure_ascii=False).encode()

    def follow(self, response: httpx.Response, base: httpx.URL) -> httpx.URL | None:
        """Return None: an answer is the answer."""
        return None

    def reply(self, response: httpx.Response) -> Any:
        """Return the body as a chat completion."""
        return self.from_wire(parsed(response.content))
