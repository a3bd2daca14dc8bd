"""A run of several ranks in which nothing moves any more: it ends, and says for which rank the others wait.

Ranks count what they have done in the store through which they found each other. In a hang most of them wait inside a
collective for one that has not come there: it has counted least, or is the only one outside of torch.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from posttrain.errors import TrainingError
from posttrain.runtime.failures import is_first, key_of, store

PUBLISHED = 5.0
"""Seconds between looks, at most."""


class Watchdog:
    """Counts what a rank does, and looks whether that goes on."""

    def __init__(self, rank: int, world_size: int, seconds: float, report: Callable[[BaseException], Any]) -> None:
        self.rank, self.world_size, self.seconds, self.report = rank, world_size, seconds, report
        self.count = 0
        self._written: Path | None = None
        self._over = threading.Event()

    def beat(self) -> None:
        """Take note that the rank has done something."""
        self.count += 1

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Let it count meanwhile that files grow which are written for a folder, aside as `FOLDER.tmp-...`."""
        self._written = folder
        try:
            yield
        finally:
            self._written = None
            self.beat()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch meanwhile; one process alone waits for nobody."""
        if self.world_size == 1:
            yield
            return
        thread = threading.Thread(target=self._watch, name="posttrain-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        """Publish this rank's count, and end the process when neither it nor another's has changed for too long."""
        between = min(PUBLISHED, self.seconds / 4)
        keys = [key_of(f"beat/{rank}") for rank in range(self.world_size)]
        shared: Any = store().clone()  # type: ignore[attr-defined]  # this thread has a connection of its own
        bytes_, seen, others, since = 0, -1, dict[int, At](), time.monotonic()
        while not self._over.wait(between):
            if self._written is not None and (size := size_aside(self._written)) != bytes_:
                bytes_ = size
                self.beat()
            if self.count != seen:
                seen, others, since = self.count, {}, time.monotonic()
            try:
                shared.set(keys[self.rank], json.dumps(attrs.asdict(here(self.count))))
                if (idle := time.monotonic() - since) <= self.seconds / 2:
                    continue
                if not all(shared.check([key]) for key in keys):
                    there = {rank: shared.get(key) for rank, key in enumerate(keys) if shared.check([key])}
                else:
                    there = dict(enumerate(shared.multi_get(keys)))  # one request, however many ranks
                now = {rank: At(**json.loads(said)) for rank, said in there.items()}
                if others and counts(now) != counts(others):  # this one waits for one that is at work
                    since = time.monotonic()
                others = now
                if idle > self.seconds and time.monotonic() - since > self.seconds:
                    self._end(diagnosis(now, self.world_size, self.seconds), between)
            except RuntimeError:  # the store went away with the process of rank zero; the launcher knows
                return

    def _end(self, found: tuple[list[int], str], patience: float) -> None:
        """End the process; the rank that hangs first shows where, while the others wait a moment for it to do so."""
        behind, message = found
        if self.rank in behind:
            faulthandler.dump_traceback(all_threads=True)
        else:
            time.sleep(2 * patience)
        error = TrainingError(message)
        self.report(error)
        if is_first(error):
            print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)


@attrs.frozen
class At:
    """Where a rank is."""

    count: int
    """What it has done so far."""
    host: str
    place: str
    """Function and line."""
    waits: bool
    """Whether that is inside torch, as it is for ranks that wait in a collective."""


def counts(there: dict[int, At]) -> dict[int, int]:
    """Return what each rank has done."""
    return {rank: at.count for rank, at in there.items()}


def size_aside(folder: Path) -> int:
    """Return the bytes that are written so far of what is to become a folder."""
    total = 0
    for aside in folder.parent.glob(f"{folder.name}.tmp-*"):
        for file in aside.rglob("*"):
            with suppress(OSError):  # it has just got its name
                total += file.stat().st_size
    return total


def here(count: int) -> At:
    """Return where the main thread of this process is: its innermost line of Python."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    file = Path(frame.f_code.co_filename)
    inside = "torch" in file.parts
    name = "/".join(file.parts[file.parts.index("torch") :]) if inside else file.name
    return At(count, socket.gethostname(), f"{frame.f_code.co_name} ({name}:{frame.f_lineno})", inside)


def diagnosis(there: dict[int, At], world_size: int, seconds: float) -> tuple[list[int], str]:
    """Return the ranks that are behind, and a message.

    Args:
        there: where each rank has said it is.
        world_size: how many ranks there are.
        seconds: for how long nothing has moved.
    """
    counts = {rank: there[rank].count if rank in there else -1 for rank in range(world_size)}
    behind = [rank for rank, count in counts.items() if count == min(counts.values())]
    if len(behind) == world_size:
        behind = [rank for rank in behind if not there[rank].waits]
    began = f"nothing has moved for {seconds:.0f} seconds: "
    if len(behind) in (0, world_size):
        return [], f"{began}all ranks wait in the same place, {there[0].place}; is a device or the network dead?"
    first = there.get(behind[0])
    where = f" ({first.host}), which is in {first.place}" if first else ", which has not begun"
    names = ", ".join(map(str, behind[:8])) + (" and more" if len(behind) > 8 else "")
    return behind, f"{began}the others wait for rank {names}{where}"
