"""Amazon Bedrock: its Converse interface, one by one."""

import os
from collections.abc import Iterator
from typing import Any, Literal

import attrs
import httpx

from posttrain.errors import SynthError
from posttrain.registry import block, key, suggest
from posttrain.synth.clients.auth import KeyAuth
from posttrain.synth.clients.openai import OpenAIProtocol
from posttrain.synth.clients.sigv4 import SigV4Auth
from posttrain.synth.clients.structured import How
from posttrain.synth.ledger.keys import as_secret
from posttrain.synth.sending.service import Service
from posttrain.synth.sending.wires.bedrock import CONVERSE, FORMATS, KNOWN
from posttrain.synth.sending.wires.parts import parts_of, picture
from posttrain.values import Secret

BEARER = "AWS_BEARER_TOKEN_BEDROCK"


@block("synth", "bedrock")
class BedrockSynth(OpenAIProtocol):
    """Data from models on Amazon Bedrock, asked and answered in the shapes of OpenAI.

    With `api_key` (or AWS_BEARER_TOKEN_BEDROCK) as a bearer token; otherwise requests are signed with
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, which `aws configure export-credentials --format
    env` prints. Keys of its own, such as `additionalModelRequestFields`, are passed on; forms are asked for by a tool.
    """

    mode: Literal["batch", "online"] = "online"
    """Only `online`: Bedrock's batches live in S3."""
    region: str | None = None
    """AWS_REGION or AWS_DEFAULT_REGION unless given."""
    base_url: str | None = None
    """`https://bedrock-runtime.<region>.amazonaws.com` unless given."""
    access_key: Secret | None = key(None, convert=as_secret)
    """Of an AWS account; AWS_ACCESS_KEY_ID unless given."""
    secret_key: Secret | None = key(None, convert=as_secret)
    """AWS_SECRET_ACCESS_KEY unless given."""
    session_token: Secret | None = key(None, convert=as_secret)
    """Of keys for a while; AWS_SESSION_TOKEN unless given."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what Bedrock cannot do here."""
        if self.mode == "batch":
            yield "mode", "Bedrock's batches read from and write to S3, which is not supported here: use online"

    @property
    def where(self) -> str:
        """The region.

        Raises:
            SynthError: none is named.
        """
        found = self.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not found:
            raise SynthError("BedrockSynth needs region='us-east-1' or another one, or AWS_REGION")
        return found

    @property
    def url(self) -> str:
        """Base URL."""
        return self.base_url or f"https://bedrock-runtime.{self.where}.amazonaws.com"

    @property
    def auth(self) -> httpx.Auth:
        """A bearer token, or signatures."""
        if self.api_key is not None or (BEARER in os.environ and self.access_key is None):
            return KeyAuth(self.api_key or Secret(BEARER), self.scrubber)
        named = Secret("AWS_SESSION_TOKEN") if "AWS_SESSION_TOKEN" in os.environ and self.access_key is None else None
        return SigV4Auth(
            self.access_key or Secret("AWS_ACCESS_KEY_ID"), self.secret_key or Secret("AWS_SECRET_ACCESS_KEY"),
            self.session_token or named, self.where, "bedrock", self.scrubber,
        )  # fmt: skip

    @property
    def _forms(self) -> How:
        return "tool"

    @property
    def _only_chats(self) -> bool:
        return True

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat request, in OpenAI's shape."""
        made = super().body(model, messages, given)
        if foreign := sorted(made.keys() - KNOWN):
            raise SynthError(
                f"Converse has no {foreign[0]!r}{suggest(foreign[0], KNOWN)}; what a model has of its own belongs into "
                "additionalModelRequestFields"
            )
        for part in (part for message in messages for part in parts_of(message.get("content"))):
            found = picture(part) if isinstance(part, dict) else None
            if found is not None and found[0] not in FORMATS:
                what = "an address" if not found[0] else found[0]
                raise SynthError(f"Bedrock takes images as data of {', '.join(FORMATS)}, not {what}")
        return made

    def send(self, session: Any) -> None:
        """Send what a session has to send."""
        for _, message in self.check():
            raise SynthError(message)
        super().send(session)

    def online_service(self) -> Service:
        """Return where requests go one by one."""
        return attrs.evolve(super().online_service(), dialect=CONVERSE)
