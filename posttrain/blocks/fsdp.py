"""FSDP2 (torch's `fully_shard`) on Fabric: each decoder layer is a unit, and the rest of the network is one.

Only rank zero needs the weights; what other ranks build may lie on the meta device, and gets its rows sent.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from posttrain.errors import RecipeError

CALLED = ("generate", "top_log_probs")
"""Methods besides `forward` that use parameters, and so must gather them first."""


class _EveryMicroBatchReduces(_BackwardSyncControl):
    """Putting a reduction off would keep gradients whole on every rank, which is what sharding is there to avoid."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()


class FullyShard(ModelParallelStrategy):
    """Fabric's strategy with one way to shard, for networks to train and for frozen ones; keys are the block's."""

    sends_weights = True
    """From rank zero, so that no other has to load them."""

    def __init__(self, reshard_after_forward: bool, cpu_offload: bool, shard_size: int | None) -> None:
        gpus = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if cpu_offload and gpus else None  # norms are summed where gradients are
        super().__init__(lambda module, _: self.shard(module), process_group_backend=backend)
        self.reshard_after_forward, self.cpu_offload, self.shard_size = reshard_after_forward, cpu_offload, shard_size
        self._backward_sync_control = _EveryMicroBatchReduces()

    def setup_environment(self) -> None:
        """Lay all ranks out as one data-parallel group."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        world, size = self.world_size, self.shard_size or self.world_size
        if world % size:
            raise RecipeError(f"strategy.shard_size: {world} ranks cannot be divided into groups of {size}")
        self.mesh = init_device_mesh(
            self.root_device.type, (world // size, size) if size < world else (world,),
            mesh_dim_names=("replicate", "shard") if size < world else ("shard",),
        )  # fmt: skip

    def shard(self, module: nn.Module) -> nn.Module:
        """Shard a network in place. All ranks must call it; rank zero's weights are what every rank gets."""
        given = tensors_of(module)
        low = self.precision.precision.startswith("bf16")
        keys: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if self.precision.precision == "bf16-mixed" else None,
                reduce_dtype=torch.float32 if low else None,
                cast_forward_inputs=False,  # a batch may hold log-probabilities; layers cast what they must
            ),
            "offload_policy": self.offload_policy,
        }
        for unit in units(module):
            fully_shard(unit, reshard_after_forward=self.reshard_after_forward, **keys)
        fully_shard(module, **keys)
        for method in CALLED:
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
        missing = any(tensor.is_meta for tensor in given.values())
        flags: list[Any] = [None] * self.world_size
        dist.all_gather_object(flags, missing)
        if any(flags):
            send(module, given, self.mesh, self.root_device, torch.device("cpu") if self.cpu_offload else None)
        return module

    @property
    def offload_policy(self) -> OffloadPolicy:
        """Where parameters, gradients and the optimizer's state are kept."""
        if not self.cpu_offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")

    def clip_gradients_norm(self, module: Any, optimizer: Any, max_norm: float, *_: Any, **__: Any) -> Tensor:
        """Clip to the norm over all ranks' rows, and return it; the host does not wait for it."""
        parameters = [parameter for parameter in self.precision.main_params(optimizer) if parameter.grad is not None]
        norm = get_total_norm(parameter.grad for parameter in parameters)  # type: ignore[misc]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that transformers says must stay whole: the decoder layers."""
    whole = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return (part for part in list(module.modules()) if type(part).__name__ in whole)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what a network holds by name, as aliases: its own tensors may be moved and given up meanwhile."""
    both = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name: tensor.detach() for held in both for name, tensor in held}


def send(
    module: nn.Module,
    given: dict[str, Tensor],
    mesh: DeviceMesh | None,
    device: torch.device,
    keep: torch.device | None = None,
) -> None:
    """Fill a network with rank zero's weights, one tensor at a time. All ranks must call it.

    Args:
        module: perhaps sharded in place.
        given: what it held before, by name: rank zero's weights, on other ranks perhaps none.
        mesh: of the shards, if there are any.
        device: of this rank.
        keep: where its rows stay, unless on the device.
    """
    first, made = dist.get_rank() == 0, {}
    for prefix, owner in module.named_modules():
        for held in (owner._parameters, owner._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied tensors stay tied
                    whole = given[f"{prefix}.{name}" if prefix else name]
                    whole = whole.detach().to(device) if first else torch.empty_like(whole, device=device)
                    made[id(tensor)] = tensor, sent(whole, tensor, mesh, keep)
                held[name] = made[id(tensor)][1]


def sent(whole: Tensor, held: Tensor, mesh: DeviceMesh | None, keep: torch.device | None) -> Tensor:
    """Return rank zero's tensor as this rank holds it."""
    if not isinstance(held, DTensor):
        dist.broadcast(whole, 0)
        return nn.Parameter(whole, held.requires_grad) if isinstance(held, nn.Parameter) else whole
    rows = distribute_tensor(whole, mesh, held.placements)
    return nn.Parameter(rows.to(keep) if keep else rows, held.requires_grad)


def shards(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every parameter as its shard, also those that an evaluation has left gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    yield from module.named_parameters()


def start_of(tensor: DTensor) -> int:
    """Return where this rank's rows begin in the flattened tensor."""
    mesh, begin, rows = tensor.device_mesh, 0, tensor.shape[0] if tensor.ndim else 1
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        assert isinstance(placement, Shard) and placement.dim == 0, "fully_shard cuts the first dimension"
        each = -(-rows // mesh.size(axis))
        begin += min(each * mesh.get_local_rank(axis), rows)
    return begin * (tensor.numel() // max(1, rows))


@contextmanager
def without_weights(fabric: Any) -> Iterator[bool]:
    """Build on the meta device where rank zero will send the weights, or nobody wants them; yields whether so."""
    if getattr(fabric, "without_weights", False):  # see tracing.py
        yield True
        return
    if not getattr(getattr(fabric, "strategy", None), "sends_weights", False) or fabric.is_global_zero:
        yield False
        return
    import warnings

    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        yield True
