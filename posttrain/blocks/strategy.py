"""How ranks share the work: Lightning Fabric strategies."""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.errors import RecipeError
from posttrain.registry import block

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy

OWNED = {
    "train_batch_size": "micro_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "bf16": "precision",
    "fp16": "precision",
}
"""Keys of a DeepSpeed configuration -> the key of the recipe that says it; `auto` means the same."""


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
    """Handed to DeepSpeed as it is; batch sizes, clipping, precision and optimizer are the recipe's to say."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what the configuration says although the recipe does."""
        for name, ours in OWNED.items():
            if self.config.get(name, "auto") != "auto":
                yield "config", f"{name!r} cannot be set here: the recipe says it with `{ours}`"

    def build(self) -> "Strategy | str":
        """Return Fabric's strategy, put right (see deepspeed.py).

        Raises:
            RecipeError: deepspeed is not installed.
        """
        if not importlib.util.find_spec("deepspeed"):
            raise RecipeError("strategy: deepspeed is not installed: pip install 'posttrain[deepspeed]'")
        from posttrain.blocks.deepspeed import Engine

        return Engine({name: value for name, value in self.config.items() if name not in OWNED})
