"""How a run of requests goes, as one line on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from posttrain.runtime.terminal import logged_to
from posttrain.synth.ledger.session import Progress


@contextmanager
def shown(progress: Callable[[Progress], None] | None = None) -> Iterator[Callable[[Progress], None]]:
    """Yield what is to be called with the progress: what was given, or else a line on a terminal, if there is one."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    if progress is not None or not console.is_terminal:
        yield progress or silent
        return
    terminal = sys.stderr
    with Live(Text(""), console=console, refresh_per_second=4) as live, logged_to(sys.stderr, instead_of=terminal):
        yield lambda progress: live.update(Text(line(progress)))


def silent(progress: Progress) -> None:
    """Show nothing."""


def line(progress: Progress) -> str:
    """Return the progress as a line."""
    left = progress.seconds_left
    parts = [
        f"{progress.done:,}/{progress.total:,} done", f"{progress.failed:,} failed",
        f"{progress.in_flight:,} in flight",
        f"{progress.input_tokens + progress.output_tokens:,} tokens",
        "cost unknown" if progress.cost is None else f"${progress.cost:.4f}",
        "" if left is None else f"{left:,.0f} s left", progress.note,
    ]  # fmt: skip
    return "  ".join(part for part in parts if part)
