"""What clients of servers have in common: how often they ask, and how long they wait."""

from typing import Any

import attrs
from attrs.validators import gt

from posttrain.registry import key
from posttrain.synth.clients.client import Synth
from posttrain.synth.sending.service import Service


@attrs.frozen(kw_only=True, slots=False)
class ServedSynth(Synth):
    """Base of the clients that ask a server."""

    attempts: int = key(6, check=gt(0))
    """One by one: how often a request is sent before it is given up; being told to wait does not count."""
    timeout: float = key(600.0, check=gt(0))
    """Seconds for a whole request."""
    patience: float = key(300.0, check=gt(0))
    """Seconds without any answer but "wait", or without any server, after which the task stops. What came is kept, and
    the same command goes on from there."""
    transport: Any = attrs.field(default=None, repr=False)
    """An httpx transport to use instead of the network, such as `httpx.MockTransport`; set it from Python."""

    def _one_by_one(self, urls: list[str], **more: Any) -> Service:
        """Return where requests go one by one."""
        return Service(
            urls=urls, attempts=self.attempts, timeout=self.timeout, patience=self.patience, transport=self.transport,
            **more,
        )  # fmt: skip
