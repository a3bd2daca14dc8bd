"""Where batches are made, what a server says about one, and what can happen to a call."""

from typing import TYPE_CHECKING, Any

import attrs
import httpx

from posttrain.synth.ledger.replies import Verdict

if TYPE_CHECKING:
    from posttrain.synth.sending.batches.api import BatchAPI

TERMINAL = ("completed", "failed", "expired", "cancelled")


class Lost(Exception):
    """The reply to a call that creates something did not come: it may have happened, or not."""


class Refused(Exception):
    """The server understood a call and said no; nothing has happened."""

    def __init__(self, said: Verdict) -> None:
        super().__init__(f"HTTP {said.status} {said.code}: {said.message}")
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
    patience: float = 300.0
    transport: httpx.BaseTransport | None = None
    api: "type[BatchAPI] | None" = None
    """Its calls, if they are not those of OpenAI."""
