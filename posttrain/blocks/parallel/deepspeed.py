"""Fabric's DeepSpeed strategy, put right: every micro-batch counts, clipping is the recipe's, and CPUs will do.

Under stock Fabric the optimizer step goes around the engine, so that with ZeRO 1 and 2 only the last micro-batch of an
accumulation window counts; and DeepSpeed clips at 1.0 unless told otherwise.
"""

import argparse
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.accelerators.cuda import CUDAAccelerator
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning.fabric.utilities.seed import reset_seed
from torch import Tensor, nn

from posttrain.blocks.parallel.sharding import EveryMicroBatchSyncs, ShardingStrategy, replace_tensors, send, tensors_of
from posttrain.blocks.parallel.shards import ParameterShard
from posttrain.errors import CheckpointError, RecipeError
from posttrain.runtime.launch import silence_libraries
from posttrain.runtime.precision import keeping_buffers

OURS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "managed_gradient_accumulation": False,
    "gradient_accumulation_steps": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
}
"""The loop accumulates and weighs micro-batches and says when to step and how to clip; DeepSpeed only shards."""


def gathered(engine: Any) -> dict[str, Any] | None:
    """Return the whole parameters of a ZeRO-3 engine, on rank zero; None for other stages, which hold them whole.

    All ranks must call it.
    """
    if engine.zero_optimization_stage() < 3:
        return None
    found: dict[str, Any] | None = engine._zero3_consolidated_16bit_state_dict()
    return found or {}


def step(engine: Any, max_grad_norm: float | None) -> Tensor | float | None:
    """Clip and step, and return the norm that the gradients had; None unless it was asked for."""
    engine._config.gradient_clipping = max_grad_norm or 0.0
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = max_grad_norm or 0.0
        engine.step()
        return None if max_grad_norm is None else engine.get_global_grad_norm()
    norms: list[Tensor] = []  # stage 0 in float32 sums gradients in its step, clips then, and forgets the norm
    engine.clip_fp32_gradients = lambda: norms.append(nn.utils.clip_grad_norm_(trained(engine), max_grad_norm or 0.0))
    engine.step()
    return norms[0] if norms else None


def shards(engine: Any, rank: int, world_size: int) -> Iterator[ParameterShard]:
    """Yield what this rank keeps of each trained parameter, in the precision that the optimizer works in.

    Raises:
        CheckpointError: this way to offload keeps it where it cannot be reached.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 3:
            if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
                raise CheckpointError("checkpoints of type resume cannot be written of a state offloaded to NVMe")
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat, start = optimizer.fp32_partitioned_groups_flat[group], count * rank
            count = max(0, min(count, parameter.ds_numel - start))  # the last rank's range is padded
            values = flat.detach().narrow(0, offset, count)
            yield ParameterShard(name, tuple(parameter.ds_shape), start, values, flat, offset)
        elif hasattr(parameter, "_hp_mapping"):
            found = parameter._hp_mapping
            if found is None:  # all of it is on other ranks
                continue
            flat, offset = flat_groups(optimizer)[found.param_group_index], found.hp_fragment_address.start
            count, start = found.hp_fragment_address.numel, found.lp_fragment_address.start
            values = flat.detach().narrow(0, offset, count)
            yield ParameterShard(name, tuple(parameter.shape), start, values, flat, offset)
        else:
            values = parameter.detach().view(-1)
            yield ParameterShard(name, tuple(parameter.shape), 0, values, parameter, copies=(rank, world_size))


def flat_groups(optimizer: Any) -> list[Tensor]:
    """Return what this rank keeps of each group of parameters, laid end to end."""
    zero = hasattr(optimizer, "single_partition_of_fp32_groups")
    groups: list[Tensor] = optimizer.single_partition_of_fp32_groups if zero else optimizer.fp32_groups_flat_partition
    return groups


def publish(engine: Any) -> None:
    """Give the network what was written into its shards. All ranks must call it."""
    if engine.zero_optimization_stage() == 3:
        for shard, parameter in zip(shards(engine, dist.get_rank(), 0), trained(engine), strict=True):
            parameter.ds_tensor.view(-1)[: len(shard.values)].copy_(shard.values)
    elif hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def trained(engine: Any) -> Iterator[Any]:
    """Yield the parameters that are trained."""
    return (parameter for parameter in engine.module.parameters() if parameter.requires_grad)


def make_room(module: nn.Module, device: torch.device) -> None:
    """Let a network without weights receive rank zero's, which DeepSpeed sends, parameter by parameter.

    Memory that nobody has written to takes no room. All ranks must call it: buffers are sent here.
    """

    def emptied(name: str, held: Tensor) -> Tensor:
        if isinstance(held, nn.Parameter):
            return torch.empty_like(held, device="cpu") if held.is_meta else held
        whole = torch.empty_like(held, device=device) if held.is_meta else held.to(device)
        dist.broadcast(whole, 0)
        return whole

    replace_tensors(module, emptied)


def partition(module: nn.Module, strategy: Any) -> None:
    """Cut a network up for ZeRO-3, parameter by parameter; its engine would first move all of it to the device."""
    if not strategy.zero_stage_3:
        return
    if dist.get_world_size() > 1 and getattr(module, "seldom", None):
        raise RecipeError(
            "strategy: ZeRO-3 gathers what sees images where it is used, and would wait forever for a rank whose "
            "rows hold none: use fsdp, or stage 2"
        )
    import deepspeed

    if strategy.precision.precision.startswith("bf16"):  # as its engine does; buffers, such as angles, stay precise
        for parameter in module.parameters():
            if parameter.is_floating_point():  # bytes stand for quantized numbers
                parameter.data = parameter.data.to(torch.bfloat16)
    deepspeed.zero.Init(module=module, config_dict_or_path=strategy.config)


class Engine(ShardingStrategy, DeepSpeedStrategy):
    """DeepSpeed, stepped by its engine, on GPUs or (for tests) on CPUs."""

    def __init__(self, config: dict[str, Any]) -> None:
        silence_libraries()
        super().__init__(config={**config, **OURS})
        self._backward_sync_control = EveryMicroBatchSyncs()

    def setup_environment(self) -> None:
        """Set up the process group; unlike the parent, on CPUs too."""
        super(DeepSpeedStrategy, self).setup_environment()

    def place(self, module: nn.Module) -> nn.Module:
        """Put a frozen network, whole, onto every rank's device."""
        send(module, tensors_of(module), None, self.root_device)
        return module

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step the engine, which steps the sharded optimizer; without clipping."""
        assert self._deepspeed_engine is not None
        return step(self._deepspeed_engine, None)

    def _setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super()._setup_distributed()
            return
        # An op that speeds up small messages would be compiled here, for minutes; training does not need it.
        comm: Any = importlib.import_module("deepspeed.comm.torch")
        comm.build_shm_op = lambda: None
        reset_seed()
        self._set_world_ranks()
        self._join()
        if not self._config_initialized:
            self._format_config()
            self._config_initialized = True

    def _join(self) -> None:
        """Make the process group; a process alone takes another port if its own was taken in the meantime."""
        environment = self.cluster_environment
        try:
            self._init_deepspeed_distributed()
        except torch.distributed.DistNetworkError:
            if self.world_size > 1 or not isinstance(environment, LightningEnvironment):
                raise
            environment._main_port = -1
            os.environ.pop("MASTER_PORT", None)
            self._init_deepspeed_distributed()

    def _initialize_engine(
        self, model: nn.Module, optimizer: Any = None, scheduler: Any = None
    ) -> tuple[Any, Any, Any]:
        import deepspeed

        with keeping_buffers(model):
            engine, optimizer, _, scheduler = deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.local_rank),
                config=self.config,
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=scheduler,
                dist_init_required=False,
            )
        return engine, optimizer, scheduler
