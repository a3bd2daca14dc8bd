"""Writing a checkpoint while training goes on: each rank its own file, and rank zero seals the folder.

Ranks tell rank zero through files that theirs are complete, not through collectives, which a thread must not call
beside training. So the folder must be on a file system that all of them share.
"""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.blocks.checkpoints import manifest
from posttrain.errors import CheckpointError
from posttrain.runtime.launch import gather_objects

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from posttrain.blocks.parallel.shards import TensorSlice
    from posttrain.run import Run

PATIENCE = 60.0
"""Seconds that rank zero waits for the files of others when its own training is over, however it ended."""


class Writer:
    """Writes one checkpoint at a time."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.folder: Path | None = None
        self.problem: str | None = None
        self.identity: dict[str, Any] = {}
        """Of the run, on rank zero (see runtime/identity.py)."""
        self.written, self.abandoned = threading.Event(), threading.Event()

    def start(
        self, fabric: "Fabric", folder: Path, ranges: "dict[str, TensorSlice]", said: dict[str, Any], keep: int
    ) -> None:
        """Begin; all ranks must call it, after `wait`.

        Args:
            fabric: of the run.
            folder: `step-N`, which appears when all is written.
            ranges: that this rank writes; nobody else may change them.
            said: the manifest but for its files, on rank zero.
            keep: how many checkpoints stay.
        """
        aside, failure = folder.with_suffix(f".tmp-{os.getpid()}"), None
        if fabric.is_global_zero:
            try:
                aside.mkdir()
            except OSError as error:
                failure = error.strerror
        aside, failure = fabric.broadcast((aside, failure))
        self.folder = folder
        self.problem = failure and complaint(folder, failure)
        self.written.clear()
        self.abandoned.clear()
        rank, world_size = fabric.global_rank, fabric.world_size

        def run() -> None:
            try:
                if failure is None:
                    write(aside, rank, ranges)
                self.written.set()
                if rank == 0 and failure is None and (files := self.collect(aside, world_size)):
                    manifest.publish(aside, folder, {**said, "files": files}, keep)
            except Exception as error:  # torch's and safetensors' writers have errors of their own
                why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                self.problem = complaint(folder, why)
            finally:
                self.written.set()
                if rank == 0:
                    shutil.rmtree(aside, ignore_errors=True)  # if it is still there

        self.thread = threading.Thread(target=run, name=name_of(folder.parent))
        self.thread.start()

    def wait(self, run: "Run") -> None:
        """Return when what was begun is on disk; all ranks must call it.

        Raises:
            CheckpointError: some rank could not write; earlier checkpoints are as they were.
        """
        if self.thread is None or self.folder is None:
            return
        with run.watchdog.writing(self.folder):
            self.written.wait()
            problems = gather_objects(run.fabric, self.problem)
            if any(problems):
                self.abandoned.set()
            self.thread.join()
            self.thread = None
            problem = next(filter(None, problems), None) or run.fabric.broadcast(self.problem)
        if problem:
            raise CheckpointError(problem)

    def collect(self, aside: Path, ranks: int) -> dict[str, Any] | None:
        """Return what every rank says of its file, when all have; None if it was given up."""
        names, end = [file_of(rank) for rank in range(ranks)], float("inf")
        while not all((aside / f"{name}.json").exists() for name in names):
            if not threading.main_thread().is_alive():
                end = min(end, time.monotonic() + PATIENCE)
            if self.abandoned.wait(0.02) or time.monotonic() > end:
                return None
        files = {}
        for name in names:
            note = aside / f"{name}.json"
            files[name] = json.loads(note.read_text())
            note.unlink()
        return files


def write(aside: Path, rank: int, ranges: "dict[str, TensorSlice]") -> None:
    """Write a rank's file, synced to disk, and then a note of its size and checksum."""
    from posttrain.blocks.checkpoints import state

    file = aside / file_of(rank)
    state.write(ranges, file)
    manifest.sync(file)
    note = aside / f"{file.name}.part"
    manifest.write_synced(note, json.dumps(manifest.describe(file)).encode())
    note.rename(aside / f"{file.name}.json")


def file_of(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def name_of(folder: Path) -> str:
    """Return the name of the thread that writes to a run's folder."""
    return f"checkpoints of {folder}"


def finish(folder: Path) -> None:
    """Wait for a writer that an earlier run in this process has left."""
    for thread in threading.enumerate():
        if thread.name == name_of(folder):
            thread.join()


def complaint(folder: Path, why: str) -> str:
    """Say that a checkpoint could not be saved, and what to do."""
    free = shutil.disk_usage(folder.parent).free
    return (
        f"the checkpoint of step {int(folder.name.removeprefix('step-'))} could not be saved to {folder.parent}: {why} "
        f"({free / 2**20:.0f} MiB free); earlier checkpoints are untouched. Make room and run again to go on"
    )
