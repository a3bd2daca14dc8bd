"""What is logged while a line at the bottom of a terminal shows how a run goes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def logged_to(stream: TextIO, instead_of: TextIO) -> Iterator[None]:
    """Let what is logged to a terminal go where rich puts it above the line that it draws, not into that line."""
    root = logging.getLogger()
    handlers = [h for h in root.handlers if isinstance(h, logging.StreamHandler) and h.stream is instead_of]
    for handler in handlers:
        handler.setStream(stream)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(instead_of)
