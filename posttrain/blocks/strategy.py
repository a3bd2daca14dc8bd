"""How ranks share the work: Lightning Fabric strategies."""

from typing import TYPE_CHECKING, Any

import attrs

from posttrain.errors import RecipeError
from posttrain.registry import block

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy


@block("strategy", "auto")
class Auto:
    """One device as it is; several with DDP."""

    def build(self) -> "Strategy | str":
        """Return Fabric's name for it."""
        return "auto"


@block("strategy", "ddp")
class DDP:
    """The whole model on every rank; gradients are averaged (torch's DistributedDataParallel)."""

    find_unused_parameters: bool = False
    """Needed when some parameters take no part in some steps; costs a walk over the graph."""
    process_group_backend: str | None = None
    """`nccl` on GPUs and `gloo` on CPUs unless given."""

    def build(self) -> "Strategy | str":
        """Return Fabric's strategy."""
        from lightning.fabric.strategies.ddp import DDPStrategy

        return DDPStrategy(
            process_group_backend=self.process_group_backend, find_unused_parameters=self.find_unused_parameters
        )


@block("strategy", "deepspeed")
class DeepSpeed:
    """ZeRO, as a DeepSpeed configuration says (extra `deepspeed`)."""

    config: dict[str, Any] = attrs.field(factory=dict)
    """Handed to DeepSpeed as it is; what the recipe says elsewhere (batch sizes, clipping) is added."""

    def build(self) -> "Strategy | str":
        """Refuse: accumulation under Fabric's DeepSpeed strategy would silently drop micro-batches.

        Raises:
            RecipeError: always, until the strategy is right.
        """
        raise RecipeError(
            "strategy: deepspeed recipes are validated, but this version does not train with DeepSpeed yet; "
            "use strategy=ddp, or leave `deepspeed` out on a single device"
        )
