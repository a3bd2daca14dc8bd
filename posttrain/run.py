"""What changes while training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.interfaces import Loaders, Position

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricModule
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@attrs.define(slots=False)
class Run:
    """One training run, from `Trainer.train()` to its return; reached as `self.run`."""

    fabric: "Fabric"
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
    position: Position = attrs.field(factory=dict)
    """Where the training data stands: the first row of the next step."""
    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    """Passes over the data that are complete."""
    first_step: int = 0
    """Where this process began: 0, or the step of the checkpoint it went on from."""
    status: str = "running"
    """`running`, then `finished`, `stopped` (stop_after), `interrupted` (a signal) or `failed`."""
    stop: str | None = None
    """Set it to a reason to end the run after this step: how a callback stops early."""
    metrics: "Metrics" = attrs.field(factory=lambda: Metrics())
    last: dict[str, float] = attrs.field(factory=dict)
    """The newest value of every metric, as the loggers got it."""

    def log(self, **values: "Tensor | float") -> None:
        """Record means over what the current micro-batch counts (inside `loss`), or over nothing (elsewhere).

        Inside `loss`, a value is weighted by `batch["weight"]` and averaged over all micro-batches
        and ranks of the step. Nothing is moved off the device until the loggers are due.
        """
        self.metrics.add(values)


class Metrics:
    """Sums of the current step, kept on the device; `take` hands over the steps that are complete."""

    def __init__(self) -> None:
        self.share: float | Tensor | None = None
        self.step: dict[str, Tensor | float] = {}
        self.shared: set[str] = set()
        self.done: list[tuple[int, dict[str, Tensor | float]]] = []

    def add(self, values: "dict[str, Tensor | float]") -> None:
        for name, value in values.items():
            value = value.detach() if hasattr(value, "detach") else value
            if self.share is None:
                self.step[name] = value
            else:
                self.shared.add(name)
                self.step[name] = self.step.get(name, 0.0) + value * self.share

    def end_step(self, step: int) -> None:
        """Close the current step."""
        self.done.append((step, self.step))
        self.step = {}
