"""Ctrl-C: the first one ends a run in order, a second one does not wait."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from posttrain.synth.ledger.session import Session


@contextmanager
def interruptible(session: Session) -> Iterator[None]:
    """Let the first Ctrl-C end the run in order; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if session.stopping.is_set():
            raise KeyboardInterrupt("interrupted twice")
        session.stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
