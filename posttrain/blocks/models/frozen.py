"""Networks that are asked but not trained: references and teachers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from posttrain.blocks.models.causal import PackedModel
from posttrain.blocks.parallel.sharding import placed


class Frozen(nn.Module):
    """A frozen network in evaluation mode, on the device and in the precision of the run; it gives no gradients."""

    def __init__(self, module: nn.Module, fabric: Fabric) -> None:
        super().__init__()
        module = fabric.strategy.precision.convert_module(module.requires_grad_(False).eval())
        if isinstance(module, PackedModel):
            module.quiet = True
        self.module = placed(module, fabric)
        self.fabric = fabric

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns."""
        with self.asking():
            return self.module(*args, **kwargs)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """For calling another method of `module` than its forward."""
        with torch.no_grad(), self.fabric.autocast():
            yield

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode."""
        return self


class WithoutAdapters(nn.Module):
    """The network in training as it was before its adapters: no second copy of the weights is held."""

    def __init__(self, module: PackedModel, fabric: Fabric) -> None:
        super().__init__()
        self.shared = (module,)  # in a tuple, so that its parameters are not this module's
        self.fabric = fabric

    @property
    def module(self) -> PackedModel:
        """The network, with its adapters."""
        return self.shared[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns with its adapters switched off."""
        module = self.module
        training, trained = module.training, [p for p in module.parameters() if p.requires_grad]
        module.eval()
        module.quiet = True
        try:
            with torch.no_grad(), self.fabric.autocast(), module.hf.disable_adapter():
                for parameter in trained:  # peft freezes them meanwhile, and FSDP2 would keep that in mind
                    parameter.requires_grad_(True)
                return module(*args, **kwargs)
        finally:
            module.train(training)
            module.quiet = False


def reference_of(module: nn.Module, fabric: Fabric) -> nn.Module:
    """Return what answers as a network does now, while the network itself goes on to be trained.

    It is a frozen copy, unless all that is trained are adapters, which can be switched off.
    """
    if isinstance(module, PackedModel) and module.hf is not module.base and not trains_biases(module.hf):
        return WithoutAdapters(module, fabric)
    return Frozen(copy.deepcopy(module), fabric)


def trains_biases(hf: Any) -> bool:
    """Whether peft trains parts of the network itself, which cannot be switched off."""
    return any(config.bias != "none" for config in hf.peft_config.values())
