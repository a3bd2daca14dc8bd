"""Fabric's DeepSpeed strategy, put right: every micro-batch counts, clipping is the recipe's, and CPUs will do.

Under stock Fabric the optimizer step goes around the engine, so that with ZeRO 1 and 2 only the last micro-batch of an
accumulation window counts; and DeepSpeed clips at 1.0 unless told otherwise.
"""

import argparse
import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric.accelerators.cuda import CUDAAccelerator
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.seed import reset_seed
from torch import nn
from torch.optim import Optimizer

OURS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "managed_gradient_accumulation": False,
    "gradient_accumulation_steps": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
}
"""The loop accumulates and weighs micro-batches and says when to step and how to clip; DeepSpeed only shards."""


class _EveryMicroBatchSyncs(_BackwardSyncControl):
    """ZeRO reduces gradients in each backward pass; there is nothing to put off."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()


def gathered(engine: Any) -> dict[str, Any] | None:
    """Return the whole parameters of a ZeRO-3 engine, on rank zero; None for other stages, which hold them whole.

    All ranks must call it.
    """
    if engine.zero_optimization_stage() < 3:
        return None
    found: dict[str, Any] | None = engine._zero3_consolidated_16bit_state_dict()
    return found or {}


class Engine(DeepSpeedStrategy):
    """DeepSpeed, stepped by its engine, on GPUs or (for tests) on CPUs."""

    def __init__(self, config: dict[str, Any]) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(config={**config, **OURS})
        self._backward_sync_control = _EveryMicroBatchSyncs()

    def setup_environment(self) -> None:
        """Set up the process group; unlike the parent, on CPUs too."""
        super(DeepSpeedStrategy, self).setup_environment()

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step the engine, which steps the sharded optimizer."""
        assert self._deepspeed_engine is not None
        return self._deepspeed_engine.step()

    def clip_gradients_norm(self, module: Any, optimizer: Optimizer, max_norm: float, *_: Any, **__: Any) -> Any:
        """Have the engine clip in its next step; the norm is not known before it."""
        module._config.gradient_clipping = float(max_norm)
        if hasattr(module.optimizer, "clip_grad"):
            module.optimizer.clip_grad = float(max_norm)

    def _setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super()._setup_distributed()
            return
        # An op that speeds up small messages would be compiled here, for minutes; training does not need it.
        comm: Any = importlib.import_module("deepspeed.comm.torch")
        comm.build_shm_op = lambda: None
        reset_seed()
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        if not self._config_initialized:
            self._format_config()
            self._config_initialized = True

    def _initialize_engine(
        self, model: nn.Module, optimizer: Any = None, scheduler: Any = None
    ) -> tuple[Any, Any, Any]:
        import deepspeed

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
