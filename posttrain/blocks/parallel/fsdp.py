"""FSDP2 (torch's `fully_shard`) on Fabric: each decoder layer is a unit, and the rest of the network is one.

Only rank zero needs the weights; what other ranks build may lie on the meta device, and gets its rows sent.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from posttrain.blocks.parallel.sharding import EveryMicroBatchSyncs, ShardingStrategy, send, tensors_of, units
from posttrain.errors import RecipeError

CALLED = ("generate", "next_logits", "top_log_probs")
"""Methods besides `forward` that use parameters, and so must gather them first."""


class FullyShard(ShardingStrategy, ModelParallelStrategy):
    """Fabric's strategy with one way to shard, for networks to train and for frozen ones; keys are the block's."""

    def __init__(self, reshard_after_forward: bool, cpu_offload: bool, shard_size: int | None) -> None:
        gpus = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if cpu_offload and gpus else None  # norms are summed where gradients are
        super().__init__(lambda module, _: self.shard(module), process_group_backend=backend)
        self.reshard_after_forward, self.cpu_offload, self.shard_size = reshard_after_forward, cpu_offload, shard_size
        self._backward_sync_control = EveryMicroBatchSyncs()

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

    def place(self, module: nn.Module) -> nn.Module:
        """Shard a frozen network like the one that is trained."""
        return self.shard(module)

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


def resharded(module: nn.Module) -> Iterator[tuple[str, Any]]:
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
