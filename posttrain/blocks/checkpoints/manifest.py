"""Folders of checkpoints: what makes one whole, and which is the newest that is.

A checkpoint is written aside, synced to disk, sealed by a manifest with checksums, and renamed: a folder named `step-N`
is whole. There is no pointer to the latest one; the newest whose checksums hold is used, and a damaged one is named and
skipped.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.runtime.launch import gather_objects
from posttrain.runtime.ours import is_checkpoint, remove_checkpoint

if TYPE_CHECKING:
    from lightning.fabric import Fabric

FORMAT = 2
NAME = "manifest.json"
log = logging.getLogger("posttrain")


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of whole checkpoints, the newest first."""
    found = filter(is_checkpoint, folder.glob("step-*"))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def go_back(folder: Path, resume: str) -> str | None:
    """Set checkpoints aside that are newer than the one that `resume` names; return what is in the way, or None.

    Once: newer ones that a run with the same `resume` has written are what the same command goes on from.
    """
    if not resume.startswith("step-"):
        return None
    there = checkpoints(folder)
    wanted = next((path for path in there if _step(path) == _step(resume)), None)
    newer = [path for path in there if _step(path) > _step(resume)]
    if any(read(path)["recipe"].get("resume") == resume for path in newer if verify(path) is None):
        return None
    if wanted is None:
        names = ", ".join(f"step-{_step(path)}" for path in reversed(there)) or "none"
        return f"resume: there is no checkpoint {resume} in {folder} (there: {names})"
    if problem := verify(wanted):
        return f"resume: {wanted} is damaged: {problem}"
    for path in newer:
        aside = path.with_name(f"left-step-{_step(path)}")
        if aside.exists():
            aside = aside.with_name(f"{aside.name}-{os.getpid()}")
        log.info("going back to %s: %s is now %s", resume, path.name, path.rename(aside).name)
    return None


def _step(name: Path | str) -> int:
    return int(str(getattr(name, "name", name)).removeprefix("step-"))


def newest_whole(folder: Path, fabric: "Fabric") -> tuple[Path | None, str | None]:
    """Return the newest checkpoint whose checksums hold; or what is wrong, if there are only damaged ones.

    All ranks must call it; each checks its share of the files.
    """
    damaged = []
    for found in fabric.broadcast(checkpoints(folder)):
        problems = gather_objects(fabric, verify(found, fabric.global_rank, fabric.world_size))
        if (problem := next(filter(None, problems), None)) is None:
            return found, None
        damaged.append(f"{found}: {problem}")
        log.warning("damaged checkpoint skipped: %s", damaged[-1])
    if damaged:
        return None, "no checkpoint in this folder is whole; start over with resume=never\n  " + "\n  ".join(damaged)
    return None, None


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, or with a rank's share of its files; None if nothing is."""
    try:
        manifest = read(folder)
        if manifest.pop("seal") != seal(manifest):
            return f"{NAME} was changed after it was written"
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version of posttrain reads {FORMAT}"
        for name, expected in list(manifest["files"].items())[rank::world_size]:
            found = describe(folder / name)
            if found != expected:
                return f"{name} has {found}, the manifest says {expected}"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} is not a manifest ({type(error).__name__}: {error})"
    return None


def read(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest."""
    found: dict[str, Any] = json.loads((folder / NAME).read_text())
    return found


def publish(aside: Path, folder: Path, manifest: dict[str, Any], keep: int) -> None:
    """Seal what was written aside, give it its name, and remove the oldest checkpoints beyond `keep`."""
    sealed = json.dumps({**manifest, "seal": seal(manifest)}, indent=1)
    write_synced(aside / NAME, sealed.encode())
    sync(aside)
    if folder.exists():
        remove_checkpoint(folder)  # it is damaged
    aside.rename(folder)
    sync(folder.parent)
    for old in checkpoints(folder.parent)[keep:]:
        remove_checkpoint(old)


def seal(manifest: dict[str, Any]) -> str:
    """Return a checksum of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def describe(file: Path) -> dict[str, Any]:
    """Return a file's size in bytes and its checksum."""
    with file.open("rb") as source:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(source, "sha256").hexdigest()}


def write_synced(file: Path, content: bytes) -> None:
    """Write a small file, synced to disk."""
    with file.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())


def sync(path: Path) -> None:
    """Sync a file, or a folder's entries, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
