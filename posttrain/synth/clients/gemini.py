"""Google's Gemini: its own interface, one by one or in batches."""

import os
from typing import Any

import attrs
import httpx

from posttrain.errors import SynthError
from posttrain.registry import block, suggest
from posttrain.synth.clients.auth import KeyAuth
from posttrain.synth.clients.openai import OpenAIProtocol
from posttrain.synth.sending.batches.service import BatchService
from posttrain.synth.sending.service import Service
from posttrain.synth.sending.wires.gemini import GENERATE, KNOWN
from posttrain.synth.sending.wires.gemini_batches import GeminiBatches
from posttrain.values import Secret


@block("synth", "gemini")
class GeminiSynth(OpenAIProtocol):
    """Data from Gemini, asked and answered in the shapes of OpenAI.

    Keys of its own, such as `thinkingConfig` and `safetySettings`, are passed on; what a model thought is
    `reasoning_content` (ask for it by `thinkingConfig: {includeThoughts: true}`).
    """

    base_url: str | None = None
    """`https://generativelanguage.googleapis.com/v1beta` unless given."""

    @property
    def url(self) -> str:
        """Base URL."""
        return self.base_url or "https://generativelanguage.googleapis.com/v1beta"

    @property
    def auth(self) -> httpx.Auth:
        """The key in its own header; GEMINI_API_KEY, or GOOGLE_API_KEY, unless given."""
        named = "GEMINI_API_KEY" if "GEMINI_API_KEY" in os.environ else "GOOGLE_API_KEY"
        found = named if named in os.environ else "GEMINI_API_KEY"
        return KeyAuth(self.api_key or Secret(found), self.scrubber, "x-goog-api-key", "")

    @property
    def _only_chats(self) -> bool:
        return True

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat request, in OpenAI's shape."""
        made = super().body(model, messages, given)
        if foreign := sorted(made.keys() - KNOWN):
            raise SynthError(f"Gemini's interface has no {foreign[0]!r}{suggest(foreign[0], KNOWN)}")
        return made

    def online_service(self) -> Service:
        """Return where requests go one by one."""
        return attrs.evolve(super().online_service(), dialect=GENERATE)

    def batch_service(self) -> BatchService:
        """Return where batches are made."""
        return self._batches(max_lines=100_000, api=GeminiBatches)
