"""The keys that all recipes of trainers have: which blocks a run is made of, how long it is, and where it runs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import attrs
from attrs.validators import ge, gt, optional

from posttrain.blocks.callbacks import EarlyStop
from posttrain.blocks.checkpoints.checkpoint import HuggingFace, Resume
from posttrain.blocks.data.data import Data
from posttrain.blocks.loggers.logger import JSONL, Console, TensorBoard
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.optimizer import AdamW
from posttrain.blocks.optimizers.blocks import ScheduleFree
from posttrain.blocks.parallel.strategy import Auto, DeepSpeed
from posttrain.blocks.scheduler import Constant, Cosine
from posttrain.blocks.tokenizers.tokenizer import HFTokenizer
from posttrain.interfaces import (
    CallbackBlock,
    CheckpointBlock,
    DataBlock,
    LoggerBlock,
    ModelBlock,
    OptimizerBlock,
    SchedulerBlock,
    SequenceBlock,
    StrategyBlock,
    TokenizerBlock,
)  # fmt: skip
from posttrain.registry import default, key, suggest


def _takes_parts(trainer: "TrainerKeys", attribute: Any, value: Any) -> None:
    if value is not None and not trainer.cuts_rows:
        raise ValueError(f"{type(trainer).__name__} needs whole rows on a device")


def _can_skip(trainer: "TrainerKeys", attribute: Any, value: Any) -> None:
    if value == "skip" and isinstance(trainer.strategy, DeepSpeed):
        raise ValueError("DeepSpeed's engine makes its updates by itself: only `stop` is possible")


def _is_way_to_resume(trainer: "TrainerKeys", attribute: Any, value: str) -> None:
    if value not in ("auto", "never", "force") and not re.fullmatch(r"step-\d+", value):
        hint = suggest(value, ("auto", "never", "force", "step-300"))
        raise ValueError(f"must be auto, never, force or a checkpoint such as step-300, not {value!r}{hint}")


Precision: TypeAlias = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true", "bf16", "fp16", "fp32"]


def _whole_name(precision: str | None) -> Any:
    return {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}.get(str(precision), precision)


@attrs.define(kw_only=True, slots=False, eq=False)
class TrainerKeys:
    """The keys that all recipes of trainers have, and what they mean."""

    model: ModelBlock
    """The network to train."""
    data: DataBlock
    """What to train on."""
    tokenizer: TokenizerBlock = default(HFTokenizer)
    """Text to tokens; the model's own by default."""
    optimizer: OptimizerBlock = default(AdamW)
    """How gradients change parameters."""
    scheduler: SchedulerBlock = default(Cosine)
    """How the learning rate changes over the steps."""
    strategy: StrategyBlock = default(Auto)
    """How several devices share the work."""
    sequence: SequenceBlock | None = key(None, check=_takes_parts)
    """How several devices share rows that are too long for one: `{type: ulysses, size: 8}`."""
    checkpoint: list[CheckpointBlock] = key(factory=lambda: [Resume(), HuggingFace()])
    """What to save, and when."""
    logger: list[LoggerBlock] = key(factory=lambda: [Console(), TensorBoard(), JSONL()])
    """Where metrics go."""
    callbacks: list[CallbackBlock] = key(factory=list, also=("callback",))
    """Blocks whose marked methods run before or after methods of the trainer or of other blocks."""
    code: list[Path] = key(factory=list)
    """Python files with blocks of your own, imported before the recipe is read; from Python, import them yourself."""

    output_dir: Path = key(Path("out"), convert=Path)
    """The run's folder: recipe, metrics, checkpoints."""
    resume: str = key("auto", check=_is_way_to_resume)
    """`auto` goes on from the newest checkpoint of the same recipe and refuses the folder of another;
    `never` starts over and clears the folder's earlier run; `force` goes on although the recipe differs;
    `step-300` goes back to that checkpoint and sets newer ones aside, as `left-step-N`."""
    epochs: float = key(1.0, also=("num_train_epochs", "num_epochs"), check=gt(0))
    """How often the data are read, unless `max_steps` is given; 0.5 reads half of them."""
    max_steps: int | None = key(None, also=("train_iters",), check=optional(gt(0)))
    """Optimizer steps of the whole run; the learning-rate schedule ends there."""
    stop_after: int | None = key(None, also=("exit_iteration_this_run",), check=optional(gt(0)))
    """End this process after so many steps, as if interrupted; for debugging and time-limited queues."""
    micro_batch_size: int = key(1, check=gt(0))
    """Rows (packed: full rows of `max_length` tokens) that one device computes at a time."""
    gradient_accumulation_steps: int = key(1, also=("accumulate",), check=gt(0))
    """Micro-batches per device and optimizer step. Cutting a step differently changes no result."""
    max_grad_norm: float | None = key(1.0, also=("gradient_clipping",), check=optional(gt(0)))
    """Clip gradients to this Euclidean norm; null to leave them alone."""
    eval_every: int | None = key(None, also=("eval_interval",), check=optional(gt(0)))
    """Evaluate every so many steps, and once at the end."""
    log_every: int = key(10, also=("train_log_iter_interval", "loss_log_interval"), check=gt(0))
    """Hand metrics to the loggers every so many steps. Every step is recorded; the device is only waited for here."""
    overfit_first_batch: bool = False
    """Train on the first step's data over and over: the loss of a sound set-up falls to almost nothing."""
    on_nonfinite: Literal["stop", "skip"] = key("stop", check=_can_skip)
    """When a loss or a gradient is not finite: stop the run, or leave the update out, count it and keep its rows in
    `skipped-rows.jsonl`; then the host waits for the device at every step."""
    hang_after: float = key(1800.0, check=gt(0))
    """Seconds without any progress after which a run of several ranks ends, and names the one the others wait for."""
    seed: int = key(42, check=ge(0))
    """Of initial weights, data order and dropout."""
    accelerator: str = "auto"
    """`cpu`, `cuda`, `mps`, or what there is."""
    devices: int | str = "auto"
    """Devices per node: a number, or what the launcher says."""
    num_nodes: int = key(1, check=gt(0))
    """Machines."""
    precision: Precision | None = key(None, convert=_whole_name)
    """Of the arithmetic; 32-true on CPUs and bf16-mixed on GPUs unless given. `bf16` means bf16-mixed, `fp16` 16-mixed,
    `fp32` 32-true."""

    updates_per_step: ClassVar[int] = 1
    """Optimizer updates that `step` makes; the schedule goes on at each. A method may make it a property."""
    cuts_rows: ClassVar[bool] = False
    """Whether `loss` is a sum over positions, so that it may be given a part of a row (`sequence`)."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself. A trainer with a check of its own yields from this one too."""
        yield from self.misfits()
        data, stops = self.data, any(isinstance(callback, EarlyStop) for callback in self.callbacks)
        advice = "there is nothing to evaluate on; give data.eval_split or data.eval_sources"
        if isinstance(data, Data) and not (data.eval_split or data.eval_sources):
            if self.eval_every is not None:
                yield "eval_every", advice
            if stops:
                yield "callbacks", f"early-stop compares evaluations, and {advice}"
        elif stops and self.eval_every is None:
            yield "callbacks", "early-stop compares evaluations: say with eval_every how often there is one"

    def misfits(self) -> Iterator[tuple[str, str]]:
        """Yield which blocks do not fit each other."""
        if isinstance(self.model, HFModel) and self.model.quantize and self.model.lora is None:
            yield "model", "quantize: what is quantized cannot be trained; write lora: {} too, to train adapters on it"
        why = getattr(type(self.optimizer), "not_flat", None)
        if why and isinstance(self.strategy, DeepSpeed):
            yield "optimizer", f"DeepSpeed lays parameters end to end, but {why}: use strategy: fsdp or ddp"
        if isinstance(self.optimizer, ScheduleFree) and type(self.scheduler) is not Constant:
            yield "scheduler", "schedule-free takes the place of a schedule: write `{type: constant, warmup: 0.03}`"
