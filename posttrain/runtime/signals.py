"""SIGTERM, SIGINT and SIGUSR1 end a run after the step in hand; a second one ends it at once.

A cluster often signals the launcher and its ranks alike, and the launcher hands its own on: what arrives within a
moment of the first is the same request.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from posttrain.runtime.launch import Later, all_reduce, on_device

if TYPE_CHECKING:
    from lightning.fabric import Fabric

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOMENT = 1.0
"""Seconds."""


class Signals:
    """Remembers the signal that asked the run to end, and lets all ranks agree on it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._agreed: Later | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle the signals for the time of a run; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self, fabric: "Fabric") -> int | None:
        """Return the signal that some rank received, the same on every rank. Call it once per step.

        The ranks' flags are combined without waiting; what is read is the result of the step before, which
        the device has long finished, so that the host keeps running ahead of it.
        """
        if fabric.world_size == 1:
            return self.received
        last, flag = self._agreed, on_device(fabric, [float(self.received or 0)])
        self._agreed = Later(all_reduce(fabric, flag, "MAX"))
        return int(last.read()) or None if last is not None else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > MOMENT:
            raise KeyboardInterrupt(f"second signal ({signal.Signals(number).name})")
