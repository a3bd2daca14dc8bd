"""Checkpoint blocks: one to go on from, one to use elsewhere."""

import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs.converters import optional as or_none
from attrs.validators import gt, optional

from posttrain.blocks.checkpoints import manifest
from posttrain.blocks.checkpoints.writer import Writer, finish
from posttrain.blocks.optimizer import averaged, members, settings, torch_optimizer
from posttrain.errors import CheckpointError
from posttrain.registry import block, key
from posttrain.runtime.folder import ADVICE, difference
from posttrain.runtime.identity import differences
from posttrain.runtime.ours import UNFINISHED, exported, in_the_way, put_in_place, remove_checkpoint
from posttrain.runtime.precision import kept_precise
from posttrain.words import counted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from posttrain.run import Run

log = logging.getLogger("posttrain")


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
        """Go on from the newest whole checkpoint in the run's folder, if there is one, or from the one in `resume`.

        Raises:
            CheckpointError: all are damaged, there is none of that name, or this run cuts the data into other steps.
        """
        from posttrain.blocks.checkpoints import state

        finish(run.output_dir)
        if run.fabric.is_global_zero:
            for stale in run.output_dir.glob("step-*"):
                if UNFINISHED.fullmatch(stale.name):
                    remove_checkpoint(stale)
            self.writer.identity = json.loads(json.dumps(run.identity()))
        problem = manifest.go_back(run.output_dir, run.recipe["resume"]) if run.fabric.is_global_zero else None
        found, damaged = manifest.newest_whole(run.output_dir, run.fabric)
        if problem := run.fabric.broadcast(problem) or damaged:
            raise CheckpointError(problem)
        if found is None:
            return
        said = manifest.read(found)
        if said["rows_per_step"] != run.rows_per_step:
            raise CheckpointError(
                f"{found} was trained with {counted(said['rows_per_step'], 'row')} per step, this run would take "
                f"{run.rows_per_step}: choose micro_batch_size x gradient_accumulation_steps x devices to match"
            )
        changed = self.changes(run, found, said)
        state.restore(run, [found / name for name in said["files"]])
        restore_rates(run, said, changed)
        run.fabric.strategy.precision.load_state_dict(said["precision"])
        run.step, run.epoch, run.position = said["step"], said["epoch"], said["position"]
        run.memory = said["memory"]

    def changes(self, run: "Run", found: Path, said: dict[str, Any]) -> list[str]:
        """Return what the recipe says otherwise than that of a checkpoint.

        Raises:
            CheckpointError: data, base weights or code are others, and the recipe does not say `resume: force`.
        """
        others = differences(said.get("identity", {}), run.fabric.broadcast(self.writer.identity))
        if others and run.recipe["resume"] != "force":
            raise CheckpointError(
                f"{found} was trained with other data, weights or code:\n  " + "\n  ".join(others) + f"\n{ADVICE}"
            )
        before = run.fabric.broadcast(said.get("recipe", run.recipe_before))
        changed = difference(before, run.recipe) if before else []
        for line in [*changed, *others]:
            log.warning("going on after step %s with a change: %s", said["step"], line)
        return changed

    def save(self, run: "Run", at_end: bool) -> None:
        """Save if it is time to, and remove the oldest checkpoints beyond `keep`.

        Raises:
            CheckpointError: this checkpoint, or the one before that was still being written, could not be saved (the
                disk is full or unwritable); earlier checkpoints are as they were.
        """
        from posttrain.blocks.checkpoints import state

        folder = run.output_dir / f"step-{run.step:08d}"
        if is_due(self, run, at_end) and run.step != run.first_step:
            self.writer.wait(run)
            run.flush()  # a loss that is not finite is raised here, and not saved
            there = run.fabric.is_global_zero and folder.exists() and manifest.verify(folder) is None
            if not run.fabric.broadcast(there):
                self.writer.start(run.fabric, folder, state.snapshot(run), self.said(run), self.keep)
        if at_end or not self.asynchronous:
            self.writer.wait(run)

    def said(self, run: "Run") -> dict[str, Any]:
        """Return the manifest, plain JSON data, but for the files.

        Raises:
            CheckpointError: the optimizer or the schedule remembers more than plain data.
        """
        groups, inner = settings(torch_optimizer(run.optimizer))
        said = {
            "format": manifest.FORMAT, "recipe": run.recipe, "identity": self.writer.identity,
            "step": run.step, "epoch": run.epoch, "position": run.position,
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


def restore_rates(run: "Run", said: dict[str, Any], changed: list[str]) -> None:
    """Restore the learning rate and the other numbers of the optimizer's groups, but for what the recipe has changed.

    Args:
        run: with its optimizer and schedule as the recipe makes them, before the first step.
        said: the manifest.
        changed: lines of `difference`.
    """
    optimizers = members(torch_optimizer(run.optimizer))
    saved_groups = {"": said["param_groups"], **said.get("inner_param_groups", {})}
    pairs = [pair for path, saved in saved_groups.items()
             for pair in zip(optimizers[path].param_groups, saved, strict=True)]  # fmt: skip
    if not changed:
        for group, saved in pairs:
            group.update(saved)
        run.scheduler.load_state_dict(said["scheduler"])
        return
    for _ in range(said["scheduler"].get("last_epoch", said["step"])):
        with warnings.catch_warnings(action="ignore"):  # it warns of steps of the schedule without the optimizer's
            run.scheduler.step()
    keys = {line.split(":")[0].split(".")[1] for line in changed if line.startswith("optimizer.")}
    for group, saved in pairs:
        keep = {"lr", "initial_lr"} | (keys if keys <= group.keys() else group.keys())
        group.update({name: value for name, value in saved.items() if name not in keep})


@block("checkpoint", "huggingface")
class HuggingFace:
    """The model and the tokenizer, as transformers and vLLM load them."""

    output_dir: Path | None = key(None, convert=or_none(Path))
    """Defaults to `huggingface` inside the run's folder."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the numbers in the files; by default that of the files that training began from. Adapters are written
    as they are trained."""
    every: int | None = key(None, also=("save_every_n_steps",), check=optional(gt(0)))
    """Optimizer steps between exports, each into a folder `step-N` of its own; null for none."""
    every_epochs: int | None = key(None, also=("save_every_n_epochs",), check=optional(gt(0)))
    """Passes over the data between exports."""
    at_end: bool = key(True, also=("save_end_of_training",))
    """Export the finished model."""

    def load(self, run: "Run") -> None:
        """See whether there is room for the export; a run never resumes from an exported model.

        Raises:
            CheckpointError: there are files of a model in its folder that are not ours.
        """
        folder, problem = self.folder(run), None
        if run.fabric.is_global_zero:
            for place in (folder, *folder.glob("step-*")):
                problem = problem or in_the_way(place, exported(place, self.is_own(run)))
            base = Path(run.recipe["model"].get("name_or_path", ""))
            if base.is_dir() and folder.is_dir() and base.samefile(folder):
                problem = f"the export would replace the model that training begins from, {folder}: name another folder"
            if (self.every or self.every_epochs) and folder == run.output_dir.absolute():
                problem = f"exports at steps would lie among the checkpoints in {folder}: name another folder for them"
        if problem := run.fabric.broadcast(problem):
            raise CheckpointError(problem)

    def folder(self, run: "Run") -> Path:
        """Return where the model goes."""
        return (self.output_dir or run.output_dir / "huggingface").absolute()

    def is_own(self, run: "Run") -> bool:
        """Whether an export that is there without a list is one of an earlier version's, in the folder of its run."""
        return self.output_dir is None and run.recipe_before is not None

    def save(self, run: "Run", at_end: bool) -> None:
        """Export if it is time to; an interrupted run exports nothing."""
        if not is_due(self, run, at_end) or (at_end and run.status != "finished"):
            return
        folder = self.folder(run)
        self.export(run, folder if at_end else folder / f"step-{run.step:08d}")

    def export(self, run: "Run", folder: Path) -> None:
        """Write the model and the tokenizer as they are now. All ranks call it.

        Raises:
            CheckpointError: the disk is full or unwritable, or files of others are in the way.
        """
        run.flush()
        with averaged(run), run.watchdog.writing(folder):
            parameters = run.strategy.full_parameters(run)
            problem = self._export(run, folder, parameters) if run.fabric.is_global_zero else None
            problem = run.fabric.broadcast(problem)
        if problem:
            raise CheckpointError(problem)

    def _export(self, run: "Run", folder: Path, parameters: dict[str, Any] | None) -> str | None:
        aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            dtype = self.dtype or getattr(run.model.module, "saved_as", None)  # a network of your own may not know
            if dtype is not None:
                parameters = cast(run.model.module, parameters, dtype)
            run.model.module.save_pretrained(aside, state_dict=parameters)  # type: ignore[operator]
            if dtype is not None:
                say_dtype(aside / "config.json", dtype)
            run.tokenizer.save_pretrained(aside)
            put_in_place(aside, folder, exported(folder, self.is_own(run)))
        except FileExistsError as error:
            return f"the model is in {aside}, and not in {folder}, because {error}, which is not ours"
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            return f"the model could not be exported to {folder}: {error.strerror or error}"
        return None


def cast(module: "nn.Module", parameters: "dict[str, Tensor] | None", dtype: str) -> "dict[str, Tensor]":
    """Return the parameters and buffers of a network in another type, but for those that must stay in float32.

    Args:
        module: the network.
        parameters: its parameters, if a rank has only parts of them.
        dtype: name of a type of torch's.
    """
    import torch

    wanted = getattr(torch, dtype)
    kept = kept_precise(module, wanted)
    once = {name for held in (module.named_parameters(), module.named_buffers()) for name, _ in held}
    given = parameters if parameters is not None else module.state_dict()
    return {
        name: value.detach().to("cpu", wanted) if value.is_floating_point() and not kept(name) else value
        for name, value in given.items() if name in once  # tied parameters by one name
    }  # fmt: skip


def say_dtype(file: Path, dtype: str) -> None:
    """Let an exported configuration say in which type the weights beside it are."""
    if not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update({name: dtype for name in ("dtype", "torch_dtype") if name in part})
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_due(block: Resume | HuggingFace, run: "Run", at_end: bool) -> bool:
    """Whether a block's intervals ask for saving after the step in hand."""
    if at_end:
        return block.at_end
    return bool(
        (block.every and run.step % block.every == 0)
        or (block.every_epochs and run.epoch_ended and run.epoch % block.every_epochs == 0)
    )
