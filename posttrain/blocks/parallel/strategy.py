"""How ranks share the work. A block gives a strategy of Fabric's, and does what differs between strategies.

It says in which order network and optimizer are set up, how an update clips and steps, which numbers of the state a
rank keeps (so that checkpoints mean the same under all of them, see state.py), and how a network becomes whole again.
"""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import gt, optional

from posttrain.errors import RecipeError
from posttrain.interfaces import OptimizerBlock
from posttrain.registry import block, key

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.strategy import Strategy
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from posttrain.blocks.parallel.shards import ParameterShard
    from posttrain.run import Run

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


class BaseStrategy:
    """What strategies share: the whole model on every rank, unless one says otherwise."""

    @property
    def shards_parameters(self) -> bool:
        """Whether a rank holds only parts of the parameters, so that all ranks must take part in each pass."""
        return False

    def build(self) -> "Strategy | str":
        """Return Fabric's strategy, or its name for one."""
        return "auto"

    def setup(self, fabric: "Fabric", model: "nn.Module", optimizer: OptimizerBlock) -> "tuple[nn.Module, Optimizer]":
        """Return the network as Fabric wraps it, and its optimizer.

        Raises:
            RecipeError: the launcher chose a strategy that needs the recipe to know of it.
        """
        from lightning.fabric.strategies.ddp import DDPStrategy
        from lightning.fabric.strategies.strategy import _Sharded

        if isinstance(fabric.strategy, _Sharded):
            name = type(fabric.strategy).__name__
            raise RecipeError(
                f"strategy: the launcher chose {name}; leave `--strategy` out and let the recipe say "
                "`strategy: fsdp` or `strategy: {type: deepspeed, config: ...}`"
            )
        if isinstance(fabric.strategy, DDPStrategy):  # also the one that Fabric chose: else gradients are there twice
            fabric.strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
        wrapped: tuple[nn.Module, Optimizer] = fabric.setup(model, optimizer.build(model))
        return wrapped

    def update(self, run: "Run", max_grad_norm: float | None) -> "Tensor | float | None":
        """Clip the gradients, step the optimizer, and return the norm that they had; None if it was not computed."""
        from posttrain.blocks.optimizer import torch_optimizer

        norm, scaled = None, run.fabric.strategy.precision.precision == "16-mixed"
        if scaled:  # fused, it would undo the loss scale in its step, and gradients could not be clipped before
            torch_optimizer(run.optimizer)._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if max_grad_norm is not None or run.skips:
            limit = float("inf") if max_grad_norm is None else max_grad_norm
            norm = run.fabric.clip_gradients(run.model, run.optimizer, max_norm=limit, error_if_nonfinite=False)
        if scaled or not run.leaves_out(norm):
            run.optimizer.step()  # with 16-mixed, the loss scale must see every step, and leaves them out itself
        run.optimizer.zero_grad()
        return norm

    def shards(self, run: "Run") -> "Iterator[ParameterShard]":
        """Yield what this rank keeps of each trained parameter."""
        from posttrain.blocks.parallel.shards import ParameterShard

        copies = run.fabric.global_rank, run.fabric.world_size
        for name, parameter in run.model.module.named_parameters():
            if parameter.requires_grad:
                values = parameter.detach().view(-1)
                yield ParameterShard(name, tuple(parameter.shape), 0, values, parameter, copies=copies)

    def restored(self, run: "Run") -> None:
        """Put what was written into the shards to use."""

    def full_parameters(self, run: "Run") -> "dict[str, Tensor] | None":
        """Return all parameters on rank zero, if the ranks hold only parts of them; all ranks must call it."""
        return None


@block("strategy", "auto")
class Auto(BaseStrategy):
    """One device as it is; several with DDP."""


@block("strategy", "ddp")
class DDP(BaseStrategy):
    """The whole model on every rank; gradients are averaged (torch's DistributedDataParallel)."""

    find_unused_parameters: bool = False
    """Needed when some parameters take no part in some steps; costs a walk over the graph."""
    process_group_backend: str | None = None
    """`nccl` on GPUs and `gloo` on CPUs unless given."""

    def build(self) -> "Strategy | str":
        """Return Fabric's strategy."""
        from lightning.fabric.strategies.ddp import DDPStrategy

        return DDPStrategy(
            process_group_backend=self.process_group_backend, find_unused_parameters=self.find_unused_parameters,
        )  # fmt: skip


@block("strategy", "fsdp")
class FSDP(BaseStrategy):
    """Parameters, gradients and optimizer state in shards (FSDP2, torch's `fully_shard`), layer by layer.

    With precision `bf16-mixed`, parameters are kept in float32, gathered and computed in bfloat16, and gradients are
    summed in float32.
    """

    reshard_after_forward: bool = True
    """Give gathered layers up after the forward pass and gather them again in the backward pass (ZeRO-3); if false they
    are kept in between, which costs memory and saves a third of the communication (ZeRO-2)."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the memory of the host, and step there."""
    shard_size: int | None = key(None, check=optional(gt(0)))
    """Ranks that share one copy of the model, such as the GPUs of a node (hybrid sharding); all by default."""

    @property
    def shards_parameters(self) -> bool:
        """It does."""
        return True

    def build(self) -> "Strategy | str":
        """Return Fabric's strategy, with one way to shard (see fsdp.py)."""
        from posttrain.blocks.parallel.fsdp import FullyShard

        return FullyShard(self.reshard_after_forward, self.cpu_offload, self.shard_size)

    def setup(self, fabric: "Fabric", model: "nn.Module", optimizer: OptimizerBlock) -> "tuple[nn.Module, Optimizer]":
        """Shard first: an optimizer made before would step tensors that nobody uses any more."""
        wrapped = fabric.setup_module(model)
        return wrapped, fabric.setup_optimizers(optimizer.build(wrapped.module))  # type: ignore[return-value]

    def shards(self, run: "Run") -> "Iterator[ParameterShard]":
        """Yield the rows that this rank keeps."""
        from posttrain.blocks.parallel.fsdp import resharded, start_of
        from posttrain.blocks.parallel.shards import ParameterShard

        mesh = run.fabric.strategy.mesh  # type: ignore[attr-defined]
        copies = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)
        for name, parameter in resharded(run.model.module):
            if parameter.requires_grad:
                rows = parameter.detach().to_local().view(-1)
                yield ParameterShard(name, tuple(parameter.shape), start_of(parameter), rows, parameter, copies=copies)

    def full_parameters(self, run: "Run") -> "dict[str, Tensor] | None":
        """Return all parameters, in the memory of rank zero's host."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        module, options = run.model.module, StateDictOptions(full_state_dict=True, cpu_offload=True)
        once = {name for held in (module.named_parameters(), module.named_buffers()) for name, _ in held}
        found: dict[str, Any] = get_model_state_dict(module, options=options)
        return {name: value for name, value in found.items() if name in once}  # tied parameters by one name


@block("strategy", "deepspeed")
class DeepSpeed(BaseStrategy):
    """ZeRO, as a DeepSpeed configuration says (extra `deepspeed`)."""

    config: dict[str, Any] = attrs.field(factory=dict)
    """Handed to DeepSpeed as it is; batch sizes, clipping, precision and optimizer are the recipe's to say."""

    @property
    def shards_parameters(self) -> bool:
        """Stage 3 does."""
        return bool(self.config.get("zero_optimization", {}).get("stage") == 3)

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
        from posttrain.blocks.parallel.deepspeed import Engine

        return Engine({name: value for name, value in self.config.items() if name not in OWNED})

    def setup(self, fabric: "Fabric", model: "nn.Module", optimizer: OptimizerBlock) -> "tuple[nn.Module, Optimizer]":
        """Set both up together: DeepSpeed makes one engine of them."""
        from posttrain.blocks.parallel.deepspeed import make_room, partition

        make_room(model, fabric.device)
        made = optimizer.build(model)  # while parameters have their shapes
        partition(model, fabric.strategy)
        wrapped: tuple[nn.Module, Optimizer] = fabric.setup(model, made)
        return wrapped

    def update(self, run: "Run", max_grad_norm: float | None) -> "Tensor | float | None":
        """Let the engine clip, step and forget the gradients; it knows their norm afterwards."""
        from posttrain.blocks.parallel.deepspeed import step

        return step(run.model._forward_module, max_grad_norm)

    def shards(self, run: "Run") -> "Iterator[ParameterShard]":
        """Yield the ranges that this rank keeps, in the precision that the optimizer works in."""
        from posttrain.blocks.parallel.deepspeed import shards

        return shards(run.model._forward_module, run.fabric.global_rank, run.fabric.world_size)

    def restored(self, run: "Run") -> None:
        """Let the network have what its optimizer was given."""
        from posttrain.blocks.parallel.deepspeed import publish

        publish(run.model._forward_module)

    def full_parameters(self, run: "Run") -> "dict[str, Tensor] | None":
        """Return all parameters on rank zero, if this stage of ZeRO shards them."""
        from posttrain.blocks.parallel.deepspeed import gathered

        return gathered(run.model._forward_module)
