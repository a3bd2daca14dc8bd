"""Learning-rate schedules, as factors of the optimizer's peak rate; `step` counts optimizer steps."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attrs.validators import and_ as both
from attrs.validators import ge, le

from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

SHARE = both(ge(0.0), le(1.0))
WARMUP = ("warmup_ratio", "warmup_steps", "num_warmup_steps")
"""What others call `warmup`."""


def _share_or_steps(block: Any, field: Any, value: float) -> None:
    if value < 0 or (value > 1 and value != int(value)):
        raise ValueError(f"must be a share below 1, or a whole number of steps, got {value:g}")


@block("scheduler", "constant")
class Constant:
    """The peak rate throughout, after warming up."""

    warmup: float = key(0.0, also=WARMUP, check=_share_or_steps)
    """Share of the steps in which the rate rises linearly, or from 1 on their number."""

    def build(self, optimizer: "Optimizer", max_steps: int) -> "LRScheduler":
        """Return the schedule for a run of `max_steps` optimizer steps."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, self.factor(max_steps))

    def factor(self, max_steps: int) -> Callable[[int], float]:
        """Return step -> factor, with step 0 the first."""
        warmup = round(self.warmup * max_steps if self.warmup < 1 else self.warmup)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return self.shape(min(1.0, (step - warmup) / max(1, max_steps - warmup)))

        return factor

    def shape(self, progress: float) -> float:
        """Return the factor at a share of the steps after warming up, 0 to 1."""
        return 1.0


@block("scheduler", "linear")
class Linear(Constant):
    """A straight line from the peak down to `floor`, after warming up."""

    floor: float = key(0.0, check=SHARE)
    """Final rate, as a share of the peak."""

    def shape(self, progress: float) -> float:
        """Return the factor at a share of the steps after warming up."""
        return 1.0 - (1.0 - self.floor) * progress


@block("scheduler", "cosine")
class Cosine(Linear):
    """Half a cosine from the peak down to `floor` (Loshchilov and Hutter, arXiv:1608.03983), after warming up."""

    warmup: float = key(0.03, also=WARMUP, check=_share_or_steps)
    """Share of the steps in which the rate rises linearly, or from 1 on their number."""

    def shape(self, progress: float) -> float:
        """Return the factor at a share of the steps after warming up."""
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@block("scheduler", "two-stage")
class TwoStage:
    """As IBM trains speculators (fms-fsdp): a cosine for each stage, the second one a tenth as high.

    In stage 1 the rate rises along a parabola in 5 % of its steps, 2,000 at most, and falls to a tenth of the peak;
    in stage 2 it falls from there to a hundredth.
    """

    stage_one: float = key(0.714, check=SHARE)
    """Share of the steps that belong to stage 1; 15,000 of 21,000 in the paper's runs."""

    def build(self, optimizer: "Optimizer", max_steps: int) -> "LRScheduler":
        """Return the schedule for a run of `max_steps` optimizer steps."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, self.factor(max_steps))

    def factor(self, max_steps: int) -> Callable[[int], float]:
        """Return step -> factor, with step 0 the first."""
        first = round(self.stage_one * max_steps)
        warmup = min(2000, round(0.05 * first))

        def factor(step: int) -> float:
            if step < warmup:
                return 1.0 - (1.0 - (step + 1) / (warmup + 1)) ** 2
            if step < first:
                return fall((step - warmup) / max(1, first - warmup), 1.0, 0.1)
            return fall(min(1.0, (step - first) / max(1, max_steps - first)), 0.1, 0.01)

        return factor


def fall(progress: float, top: float, bottom: float) -> float:
    """Return half a cosine from the top down to the bottom."""
    return bottom + (top - bottom) * 0.5 * (1.0 + math.cos(math.pi * progress))


@block("scheduler", "wsd")
class WSD(Linear):
    """Warm up, stay, decay: the peak rate, then a straight line down in the last steps (arXiv:2404.06395)."""

    decay: float = key(0.1, check=SHARE)
    """Share of the steps after warming up in which the rate falls."""

    def shape(self, progress: float) -> float:
        """Return the factor at a share of the steps after warming up."""
        falling = max(0.0, progress - (1.0 - self.decay)) / self.decay if self.decay else 0.0
        return 1.0 - (1.0 - self.floor) * falling
