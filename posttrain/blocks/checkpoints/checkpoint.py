"""Checkpoint blocks: one to go on from, one to use elsewhere."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs.converters import optional as or_none
from attrs.validators import gt, optional

from posttrain.blocks.checkpoints import manifest
from posttrain.blocks.checkpoints.writer import Writer, finish
from posttrain.blocks.optimizer import members, settings, torch_optimizer
from posttrain.errors import CheckpointError
from posttrain.registry import block, key

if TYPE_CHECKING:
    from posttrain.run import Run


@block("checkpoint", "resume")
class Resume:
    """Everything needed to go on training as if nothing had happened, in `step-N` of the run's folder.

    Each rank writes what it keeps (see state.py), so that a run can go on with another strategy or number of ranks.
    """

    every: int | None = key(500, also=("save_every_n_steps",), check=optional(gt(0)))
    """Optimizer steps between checkpoints; null for none."""
    every_epochs: int | None = key(None, also=("save_every_n_epochs",), check=optional(gt(0)))
    """Passes over the data between checkpoints."""
    at_end: bool = key(True, also=("save_end_of_training",))
    """Save when the run ends, also when a signal or `stop_after` ends it early."""
    keep: int = key(2, check=gt(0))
    """How many of the newest checkpoints stay on disk."""
    asynchronous: bool = True
    """Go on training while a copy of the state, in the memory of the host, is written to disk."""
    writer: Writer = attrs.field(init=False, repr=False, eq=False, factory=Writer)

    def load(self, run: "Run") -> None:
        """Go on from the newest whole checkpoint in the run's folder, if there is one.

        Raises:
            CheckpointError: all are damaged, or this run cuts the data into other steps.
        """
        from posttrain.blocks.checkpoints import state

        finish(run.output_dir)
        if run.fabric.is_global_zero:
            for stale in run.output_dir.glob("step-*.tmp-*"):
                shutil.rmtree(stale)
        found, problem = manifest.newest_whole(run.output_dir, run.fabric)
        if problem:
            raise CheckpointError(problem)
        if found is None:
            return
        said = manifest.read(found)
        if said["rows_per_step"] != run.rows_per_step:
            raise CheckpointError(
                f"{found} was trained with {said['rows_per_step']} rows per step, this run would take "
                f"{run.rows_per_step}: choose micro_batch_size x gradient_accumulation_steps x devices to match"
            )
        state.restore(run, [found / name for name in said["files"]])
        optimizers = members(torch_optimizer(run.optimizer))
        for path, groups in {"": said["param_groups"], **said.get("inner_param_groups", {})}.items():
            for group, saved in zip(optimizers[path].param_groups, groups, strict=True):
                group.update(saved)
        run.scheduler.load_state_dict(said["scheduler"])
        run.fabric.strategy.precision.load_state_dict(said["precision"])
        run.step, run.epoch, run.position = said["step"], said["epoch"], said["position"]
        run.memory = said["memory"]

    def save(self, run: "Run", at_end: bool) -> None:
        """Save if it is time to, and remove the oldest checkpoints beyond `keep`.

        Raises:
            CheckpointError: this checkpoint, or the one before that was still being written, could not be saved (the
                disk is full or unwritable); earlier checkpoints are as they were.
        """
        from posttrain.blocks.checkpoints import state

        folder = run.output_dir / f"step-{run.step:08d}"
        if is_due(self, run, at_end) and run.step != run.first_step:
            self.writer.wait(run.fabric)
            run.flush()  # a loss that is not finite is raised here, and not saved
            there = run.fabric.is_global_zero and folder.exists() and manifest.verify(folder) is None
            if not run.fabric.broadcast(there):
                self.writer.start(run.fabric, folder, state.snapshot(run), self.said(run), self.keep)
        if at_end or not self.asynchronous:
            self.writer.wait(run.fabric)

    def said(self, run: "Run") -> dict[str, Any]:
        """Return the manifest, plain JSON data, but for the files.

        Raises:
            CheckpointError: the optimizer or the schedule remembers more than plain data.
        """
        groups, inner = settings(torch_optimizer(run.optimizer))
        said = {
            "format": manifest.FORMAT, "step": run.step, "epoch": run.epoch, "position": run.position,
            "memory": run.memory, "rows_per_step": run.rows_per_step, "world_size": run.fabric.world_size,
            "param_groups": groups, **({"inner_param_groups": inner} if inner else {}),
            "scheduler": run.scheduler.state_dict(), "precision": run.fabric.strategy.precision.state_dict(),
        }  # fmt: skip
        try:
            plain: dict[str, Any] = json.loads(json.dumps(said))
        except TypeError as error:
            raise CheckpointError(
                f"a checkpoint of type resume cannot hold what the optimizer, the schedule or a callback remembers: "
                f"{error}; only numbers, texts, lists and dicts of them"
            ) from None
        return plain


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
        parameters = run.strategy.full_parameters(run)
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
