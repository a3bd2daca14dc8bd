"""How ranks share the work: Lightning Fabric strategies."""

from typing import TYPE_CHECKING, Any

import attrs

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
        """Return Fabric's strategy."""
        from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(config=self.config)
