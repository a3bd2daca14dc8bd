"""Checkpoint blocks: one to go on from, one to use elsewhere.

A checkpoint to go on from is written aside, synced to disk, sealed by a manifest with checksums, and
renamed: a folder named `step-N` is whole. There is no pointer to the latest one; the newest whose
checksums hold is used, and a damaged one is named and passed over.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs.converters import optional as or_none
from attrs.validators import gt, optional

from posttrain.errors import CheckpointError
from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import nn

    from posttrain.run import Run

FORMAT = 1
log = logging.getLogger("posttrain")


@block("checkpoint", "resume")
class Resume:
    """Everything needed to go on training as if nothing had happened, in `step-N` of the run's folder."""

    every: int | None = key(500, also=("save_every_n_steps",), check=optional(gt(0)))
    """Optimizer steps between checkpoints; null for none."""
    every_epochs: int | None = key(None, also=("save_every_n_epochs",), check=optional(gt(0)))
    """Passes over the data between checkpoints."""
    at_end: bool = key(True, also=("save_end_of_training",))
    """Save when the run ends, also when a signal or `stop_after` ends it early."""
    keep: int = key(2, check=gt(0))
    """How many of the newest checkpoints stay on disk."""

    def load(self, run: "Run") -> None:
        """Go on from the newest whole checkpoint in the run's folder, if there is one.

        Raises:
            CheckpointError: all are damaged, or this run cuts the data into other steps.
        """
        if is_sharded(run):
            raise CheckpointError(
                "checkpoints of type resume cannot be written under a sharded strategy yet; "
                "leave them out: checkpoint: [{type: huggingface}]"
            )
        found, problem = None, None
        if run.fabric.is_global_zero:
            for stale in run.output_dir.glob("step-*.tmp-*"):
                shutil.rmtree(stale)
            found, problem = newest_whole(run.output_dir)
        found, problem = run.fabric.broadcast((found, problem))
        if problem:
            raise CheckpointError(problem)
        if found is None:
            return
        manifest = json.loads((found / "manifest.json").read_text())
        if manifest["rows_per_step"] != run.rows_per_step:
            raise CheckpointError(
                f"{found} was trained with {manifest['rows_per_step']} rows per step, this run would take "
                f"{run.rows_per_step}: choose micro_batch_size x gradient_accumulation_steps x devices to match"
            )
        load_state(run, found / "state.pt")
        run.step, run.epoch, run.position = manifest["step"], manifest["epoch"], manifest["position"]
        run.memory = manifest["memory"]

    def save(self, run: "Run", at_end: bool) -> None:
        """Save if it is time to, and remove the oldest checkpoints beyond `keep`.

        Raises:
            CheckpointError: the disk is full or unwritable; earlier checkpoints are as they were.
        """
        folder = run.output_dir / f"step-{run.step:08d}"
        if not is_due(self, run, at_end) or run.step == run.first_step:
            return
        run.flush()  # a loss that is not finite is raised here, and not saved
        problem = self._write(run, folder) if run.fabric.is_global_zero else None
        if problem := run.fabric.broadcast(problem):
            raise CheckpointError(problem)

    def _write(self, run: "Run", folder: Path) -> str | None:
        if folder.exists() and verify(folder) is None:
            return None
        aside = folder.with_suffix(f".tmp-{os.getpid()}")
        try:
            aside.mkdir()
            write_state(state_of(run), aside / "state.pt")
            manifest = {
                "format": FORMAT, "step": run.step, "epoch": run.epoch, "position": run.position,
                "memory": run.memory, "rows_per_step": run.rows_per_step, "world_size": run.fabric.world_size,
                "files": {file.name: describe(file) for file in sorted(aside.iterdir())},
            }  # fmt: skip
            write_synced(aside / "manifest.json", json.dumps({**manifest, "seal": seal(manifest)}, indent=1).encode())
            sync(aside)
            if folder.exists():
                remove(folder)  # it is damaged
            aside.rename(folder)
            sync(run.output_dir)
            for old in checkpoints(run.output_dir)[self.keep :]:
                remove(old)
        except (OSError, RuntimeError) as error:  # torch's writer hides the disk's error behind one of its own
            shutil.rmtree(aside, ignore_errors=True)
            cause = error if isinstance(error, OSError) else error.__context__
            why = cause.strerror if isinstance(cause, OSError) else error
            free = shutil.disk_usage(run.output_dir).free
            return (
                f"the checkpoint of step {run.step} could not be saved to {run.output_dir}: {why} "
                f"({free / 2**20:.0f} MiB free); earlier checkpoints are untouched. Make room and run again to go on"
            )
        return None


@block("checkpoint", "huggingface")
class HuggingFace:
    """The model and the tokenizer, as transformers and vLLM load them."""

    output_dir: Path | None = key(None, convert=or_none(Path))
    """Defaults to `huggingface` inside the run's folder."""
    every: int | None = key(None, also=("save_every_n_steps",), check=optional(gt(0)))
    """Optimizer steps between exports, each into a folder `step-N` of its own; null for none."""
    every_epochs: int | None = key(None, also=("save_every_n_epochs",), check=optional(gt(0)))
    """Passes over the data between exports."""
    at_end: bool = key(True, also=("save_end_of_training",))
    """Export the finished model."""

    def load(self, run: "Run") -> None:
        """Nothing: an exported model is a starting point, named by `model.name_or_path`."""

    def save(self, run: "Run", at_end: bool) -> None:
        """Export if it is time to; an interrupted run exports nothing."""
        if not is_due(self, run, at_end) or (at_end and run.status != "finished"):
            return
        run.flush()
        folder = self.output_dir or run.output_dir / "huggingface"
        folder = folder if at_end else folder / f"step-{run.step:08d}"
        parameters = whole_parameters(run)
        problem = self._export(run, folder, parameters) if run.fabric.is_global_zero else None
        if problem := run.fabric.broadcast(problem):
            raise CheckpointError(problem)

    def _export(self, run: "Run", folder: Path, parameters: dict[str, Any] | None) -> str | None:
        aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            run.model.module.save_pretrained(aside, state_dict=parameters)  # type: ignore[operator]
            run.tokenizer.save_pretrained(aside)
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            return f"the model could not be exported to {folder}: {error.strerror or error}"
        return None


def is_due(block: Resume | HuggingFace, run: "Run", at_end: bool) -> bool:
    """Whether a block's intervals ask for saving after the step in hand."""
    if at_end:
        return block.at_end
    return bool(
        (block.every and run.step % block.every == 0)
        or (block.every_epochs and run.epoch_ended and run.epoch % block.every_epochs == 0)
    )


def remove(folder: Path) -> None:
    """Remove a checkpoint; a crash on the way leaves no half-removed `step-N`."""
    shutil.rmtree(folder.rename(folder.with_suffix(f".tmp-old-{os.getpid()}")))


def is_sharded(run: "Run") -> bool:
    """Whether each rank holds only a part of the parameters or of the optimizer's state."""
    from lightning.fabric.strategies.strategy import _Sharded

    return isinstance(run.fabric.strategy, _Sharded)


def whole_parameters(run: "Run") -> dict[str, Any] | None:
    """Return all parameters, on rank zero, if the ranks hold only parts of them; all ranks must call it."""
    if not is_sharded(run):
        return None
    from posttrain.blocks.deepspeed import gathered

    return gathered(run.model._forward_module)


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of whole checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step-*") if not path.suffix), reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, str | None]:
    """Return the newest checkpoint whose checksums hold; or what is wrong, if there are only damaged ones."""
    damaged = []
    for found in checkpoints(folder):
        if (problem := verify(found)) is None:
            return found, None
        damaged.append(f"{found}: {problem}")
        log.warning("damaged checkpoint passed over: %s", damaged[-1])
    if damaged:
        return None, "no checkpoint in this folder is whole; start anew with resume=never\n  " + "\n  ".join(damaged)
    return None, None


def verify(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("seal") != seal(manifest):
            return "manifest.json was changed after it was written"
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version of posttrain reads {FORMAT}"
        for name, expected in manifest["files"].items():
            found = describe(folder / name)
            if found != expected:
                return f"{name} has {found}, the manifest says {expected}"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is not a manifest ({type(error).__name__}: {error})"
    return None


def state_of(run: "Run") -> dict[str, Any]:
    """Return what a run needs to go on: trained parameters, buffers, optimizer and schedule.

    Frozen parameters come from where they came from. Random numbers need no place: every step is
    seeded by its number.
    """
    return {
        "model": trained_state(run.model.module),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
    }


def trained_state(module: "nn.Module") -> dict[str, Any]:
    """Return a module's parameters and buffers, without the parameters that are frozen."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_state(run: "Run", file: Path) -> None:
    """Put a saved state back. Nothing but tensors and plain data is loaded: no pickled code."""
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors and plain data, and is not loaded: {error}") from None
    expected = set(trained_state(run.model.module))
    if expected != set(state["model"]):
        differ = sorted(expected ^ set(state["model"]))
        raise CheckpointError(f"{file} holds other parameters than this model trains: {', '.join(differ[:5])}, ...")
    run.model.module.load_state_dict(state["model"], strict=False)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])


def write_state(state: dict[str, Any], file: Path) -> None:
    """Write tensors and plain data, synced to disk."""
    import torch

    with file.open("wb") as target:
        torch.save(state, target)
        target.flush()
        os.fsync(target.fileno())


def write_synced(file: Path, content: bytes) -> None:
    """Write a small file, synced to disk."""
    with file.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())


def sync(folder: Path) -> None:
    """Sync a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(manifest: dict[str, Any]) -> str:
    """Return a checksum of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def describe(file: Path) -> dict[str, Any]:
    """Return a file's size in bytes and its checksum."""
    with file.open("rb") as source:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(source, "sha256").hexdigest()}
