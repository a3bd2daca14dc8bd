"""Learning-rate schedules, as factors of the optimizer's peak rate; `step` counts optimizer steps."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from attrs.validators import and_ as both
from attrs.validators import ge, le

from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

SHARE = both(ge(0.0), le(1.0))


@block("scheduler", "constant")
class Constant:
    """The peak rate throughout, after warming up."""

    warmup: float = key(0.0, also=("warmup_ratio",), check=SHARE)
    """Share of the steps in which the rate rises linearly."""

    def build(self, optimizer: "Optimizer", max_steps: int) -> "LRScheduler":
        """Return the schedule for a run of `max_steps` optimizer steps."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, self.factor(max_steps))

    def factor(self, max_steps: int) -> Callable[[int], float]:
        """Return step -> factor, with step 0 the first."""
        warmup = round(self.warmup * max_steps)

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

    warmup: float = key(0.03, also=("warmup_ratio",), check=SHARE)
    """Share of the steps in which the rate rises linearly."""

    def shape(self, progress: float) -> float:
        """Return the factor at a share of the steps after warming up."""
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@block("scheduler", "wsd")
class WSD(Linear):
    """Warm up, stay, decay: the peak rate, then a straight line down in the last steps (arXiv:2404.06395)."""

    decay: float = key(0.1, check=SHARE)
    """Share of the steps after warming up in which the rate falls."""

    def shape(self, progress: float) -> float:
        """Return the factor at a share of the steps after warming up."""
        falling = max(0.0, progress - (1.0 - self.decay)) / self.decay if self.decay else 0.0
        return 1.0 - (1.0 - self.floor) * falling
