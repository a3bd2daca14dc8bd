"""What changes while training: the run."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.batch import Batch, Term
from posttrain.errors import TrainingError
from posttrain.interfaces import Loaders, Logger, Position, StrategyBlock
from posttrain.runtime.metrics import Metrics
from posttrain.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricModule
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from posttrain.blocks.parallel.shards import TensorSlice

SKIPPED_IN_A_ROW = 20
"""So many steps that are left out one after the other end a run. (A loss scale of 65,536 takes a dozen to settle.)"""


@attrs.define(slots=False, kw_only=True)
class Run:
    """One training run, from `Trainer.train()` to its return; reached as `self.run`."""

    fabric: "Fabric"
    strategy: StrategyBlock
    output_dir: Path
    model: "_FabricModule"
    """The trained network, wrapped by Fabric; `run.model.module` is the network itself."""
    frozen: dict[str, "nn.Module"]
    """The trainer's other model blocks, built and frozen: `run.frozen["reference"]`."""
    tokenizer: Any
    loaders: Loaders
    optimizer: "Optimizer"
    scheduler: "LRScheduler"
    max_steps: int
    rows_per_step: int
    """Rows of one optimizer step, all micro-batches and ranks together."""
    recipe: dict[str, Any]
    """The resolved recipe, as plain data: what was trained."""
    position: Position
    """Where the training data stands: the first row of the next step."""
    watchdog: Watchdog
    """Ends the run if a rank hangs."""
    batches: list[Batch] = attrs.field(factory=list)
    """The micro-batches of the step in hand, as `made` returned them."""
    identity: Callable[[], dict[str, Any]] = dict
    """Returns what decides the run's numbers besides its recipe (see runtime/identity.py); it may take a while."""
    recipe_before: dict[str, Any] | None = None
    """The recipe that was found in the run's folder, of the process that trained there before."""
    step: int = 0
    """Optimizer steps taken."""
    began: dict[int, Position] = attrs.field(factory=dict)
    """Where the data of each step begins, for those that are not flushed yet: to show what a failure trained on."""
    skips: bool = False
    """Whether an update whose gradients are not finite is left out, instead of ending the run."""
    epoch: int = 0
    """Passes over the data that are complete."""
    rows_per_epoch: int | None = None
    """Of the first pass; None for a stream, of which nobody knows."""
    doing: str = ""
    """What the run does now, if it is not training; shown to people."""
    epoch_ended: bool = False
    """Whether the newest step took the last row of a pass."""
    first_step: int = 0
    """Where this process began: 0, or the step of the checkpoint it went on from."""
    stop: str | None = None
    """Set it to a reason to end the run after the step in hand: how a callback stops early."""
    signal: int | None = None
    """The signal that ended the run."""
    status: str = "running"
    """Then `finished` (to the last step, or a callback's stop), `interrupted` (a signal, stop_after) or `failed`."""
    memory: dict[str, Any] = attrs.field(factory=dict)
    """What callbacks remember: plain JSON data, kept in checkpoints."""
    tensors: dict[str, "TensorSlice"] = attrs.field(factory=dict)
    """Tensors that callbacks and trainers keep, by name: written to checkpoints, and filled from one that holds them. A
    shard's are made by `shard.like(values)`, for each of `run.strategy.shards(run)`."""
    metrics: Metrics = attrs.field(factory=Metrics)
    loggers: list[Logger] = attrs.field(factory=list)
    last: dict[str, float] = attrs.field(factory=dict)
    """The newest value of every metric, as the loggers got it."""
    per_token: dict[str, float] = attrs.field(factory=dict)
    """Quantities per token, such as FLOPs, by name: each is logged per second and device, as tokens are."""
    _measured: float = attrs.field(factory=time.perf_counter)

    @property
    def suffix(self) -> str:
        """What the names of files end in that each rank writes for itself."""
        return f"-rank-{self.fabric.global_rank}" if self.fabric.world_size > 1 else ""

    def log(self, **values: "float | Tensor | Term") -> None:
        """Record metrics of the current step.

        Inside `loss`, a value is a mean over what the micro-batch counts: it is weighted and reduced
        over micro-batches and ranks like the loss. A `Term` is a sum and says what it is counted by.
        Elsewhere a value is taken as it is, from rank zero.
        Nothing is moved off the device until the loggers are due.
        """
        self.metrics.add(values)

    def to_device(self, batch: "Batch | Mapping[str, Any]") -> Batch:
        """Move a batch's tensors to the device, without waiting for it; a dict becomes a batch."""
        return Batch.of(batch).to(self.fabric.device)

    def leaves_out(self, norm: "float | Tensor | None") -> bool:
        """Whether gradients of this norm must not be used. Where updates can be skipped, the host waits for it."""
        return self.skips and norm is not None and not math.isfinite(norm)

    def skip(self) -> None:
        """Count a step that was left out.

        Raises:
            TrainingError: it is one of many in a row.
        """
        memory = self.memory
        last, in_a_row = memory.get("skipped", (None, 0))
        in_a_row = in_a_row + 1 if last == self.step - 1 else 1
        memory["skipped"], memory["skipped_steps"] = (self.step, in_a_row), memory.get("skipped_steps", 0) + 1
        self.log(skipped_steps=memory["skipped_steps"])
        if in_a_row == SKIPPED_IN_A_ROW:
            raise TrainingError(f"no gradient of {SKIPPED_IN_A_ROW} steps in a row is finite: nothing is learned")

    def flush(self) -> None:
        """Hand the closed steps to the loggers. Here, and only here, the host waits for the device.

        Raises:
            TrainingError: a loss or gradient norm is not finite.
        """
        steps = self.metrics.take(self.fabric)
        if not steps:
            return
        now = time.perf_counter()
        tokens = sum(metrics.get("tokens", 0.0) for _, metrics in steps)
        if tokens:
            rate = tokens / (now - self._measured)
            each = {name: value * rate / self.fabric.world_size for name, value in self.per_token.items()}
            steps[-1][1].update(tokens_per_second=rate, **each)
        steps[-1][1]["memory_gb"] = memory_gb(self.fabric)
        self._measured = now
        for step, metrics in steps:
            self.last |= metrics
            for logger in self.loggers:
                logger.log_metrics(metrics, step)
        for step, metrics in steps:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics.get(name, 0.0)) and "skipped_steps" not in metrics:
                    raise TrainingError(
                        f"step {step}: {name} is {metrics[name]}. Checkpoints written before it are untouched; go on "
                        "from one with a lower optimizer.lr, look at the data of this step, or leave such steps out "
                        "with on_nonfinite: skip",
                        step,
                    )
        self.began.clear()

    @property
    def epochs(self) -> float:
        """Passes over the data so far; of a stream, those that are complete."""
        part = min(1.0, self.position["row"] / self.rows_per_epoch) if self.rows_per_epoch else 0.0
        return self.epoch + part

    @contextmanager
    def unmeasured(self, doing: str = "") -> Iterator[None]:
        """Leave what is done meanwhile (evaluating, saving) out of the throughput."""
        begin, self.doing = time.perf_counter(), doing
        try:
            yield
        finally:
            self.doing = ""
            self._measured += time.perf_counter() - begin


def memory_gb(fabric: "Fabric") -> float:
    """Return the peak memory so far in GiB: of the GPU if there is one, else of the process."""
    import resource
    import sys

    import torch

    if fabric.device.type == "cuda":
        return torch.cuda.max_memory_allocated(fabric.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
