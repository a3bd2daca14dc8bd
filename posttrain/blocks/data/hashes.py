"""Hashes of files, remembered: the ranks of a run, and the next run, need not read terabytes again.

A file is known to be the same by what its file system says of it: device, inode, size and both clocks. Of these, no
program can set the time of the last change to the inode (ctime), so an edit is noticed that keeps size and date. What
was changed within the clock's grain before it was hashed is not remembered, as in git's index.
"""

import hashlib
import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

GRAIN = 2.0
"""Seconds; more than the coarsest clock of file systems in use."""


def sha256(path: Path, memory: Path | None = None) -> str:
    """Return the sha256 of a file's content.

    Args:
        path: of the file.
        memory: folder in which hashes are kept; of processes that ask at once, one reads the file. A folder that
            cannot be written is not used.

    Raises:
        OSError: the file cannot be read.
    """
    if memory is None:
        return _hashed(path)
    from filelock import FileLock

    note = memory / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.json"
    with ExitStack() as stack:
        with suppress(OSError):  # a memory that may only be read
            memory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(note.with_suffix(".lock")))
        now, state = time.time(), _state(path)
        if (known := _remembered(note)) and known["state"] == state:
            return str(known["sha256"])
        found = _hashed(path)
        if state == _state(path) and max(state[-2:]) < (now - GRAIN) * 1e9:
            _remember(note, {"path": str(path.absolute()), "state": state, "sha256": found})
        return found


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _remembered(note: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and {"state", "sha256"} <= found.keys() else None
    except (OSError, ValueError):
        return None


def _remember(note: Path, said: dict[str, Any]) -> None:
    draft = note.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(said), encoding="utf-8")
        draft.replace(note)
    except OSError:
        draft.unlink(missing_ok=True)
