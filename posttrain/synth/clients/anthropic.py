"""Anthropic: its own Messages interface, one by one or in batches."""

import os
from typing import Any

import attrs
import httpx

from posttrain.errors import SynthError
from posttrain.registry import block
from posttrain.synth.clients.auth import KeyAuth
from posttrain.synth.clients.openai import OpenAIProtocol
from posttrain.synth.clients.structured import How
from posttrain.synth.sending.batches.service import BatchService
from posttrain.synth.sending.service import Service
from posttrain.synth.sending.wires.anthropic import MESSAGES
from posttrain.synth.sending.wires.anthropic_batches import MessageBatches
from posttrain.values import Secret

FOREIGN = ("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "seed", "response_format")
"""Keys of OpenAI's interface that have no meaning here."""


@block("synth", "anthropic")
class AnthropicSynth(OpenAIProtocol):
    """Data from Anthropic, asked and answered in the shapes of OpenAI; `max_tokens` is needed.

    Keys of its own, such as `thinking` and `top_k`, are passed on; what a model thought is `reasoning_content`. Forms
    are asked for by a tool.
    """

    base_url: str | None = None
    """`https://api.anthropic.com/v1`, or ANTHROPIC_BASE_URL with `/v1`, unless given."""
    version: str = "2023-06-01"
    """Of the interface; sent as anthropic-version."""
    beta: list[str] = attrs.field(factory=list)
    """Features that are asked for by anthropic-beta."""

    @property
    def url(self) -> str:
        """Base URL."""
        named = os.environ.get("ANTHROPIC_BASE_URL")
        return self.base_url or (f"{named.rstrip('/')}/v1" if named else "https://api.anthropic.com/v1")

    @property
    def auth(self) -> httpx.Auth:
        """The key in its own header."""
        return KeyAuth(self.api_key or Secret("ANTHROPIC_API_KEY"), self.scrubber, "x-api-key", "")

    @property
    def headers(self) -> dict[str, str]:
        """The version of the interface, and features on trial."""
        return {"anthropic-version": self.version} | ({"anthropic-beta": ",".join(self.beta)} if self.beta else {})

    @property
    def _forms(self) -> How:
        return "tool"

    @property
    def _only_chats(self) -> bool:
        return True

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat request, in OpenAI's shape."""
        made = super().body(model, messages, given)
        if foreign := [name for name in FOREIGN if name in made]:
            raise SynthError(f"Anthropic's interface has no {foreign[0]!r}")
        if int(made.get("n") or 1) > 1:
            raise SynthError("Anthropic gives one answer to a request: leave out n, and send the request several times")
        if not (made.get("max_tokens") or made.get("max_completion_tokens")):
            raise SynthError("Anthropic needs max_tokens: the longest that a reply may be")
        return made

    def online_service(self) -> Service:
        """Return where requests go one by one."""
        return attrs.evolve(super().online_service(), dialect=MESSAGES)

    def batch_service(self) -> BatchService:
        """Return where batches are made: of 100,000 requests and 256 MB at most."""
        return self._batches(max_lines=100_000, api=MessageBatches)
