"""Networks that are asked but not trained: references and teachers."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from posttrain.blocks.models.packed import PackedModel
from posttrain.blocks.parallel.sharding import placed

log = logging.getLogger("posttrain")


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
        training, trained = module.training, [(p, p.requires_grad) for p in module.parameters()]
        module.eval()
        module.quiet = True
        try:
            with torch.no_grad(), self.fabric.autocast(), module.hf.disable_adapter():
                restore(trained)  # peft freezes the adapters meanwhile, and FSDP2 would keep that in mind
                return module(*args, **kwargs)
        finally:
            restore(trained)  # peft has all adapters trained again, also those that the recipe freezes
            module.train(training)
            module.quiet = False


def restore(trained: list[tuple[nn.Parameter, bool]]) -> None:
    """Have parameters trained, or not, as they were."""
    for parameter, wanted in trained:
        parameter.requires_grad_(wanted)


def reference_of(module: nn.Module, fabric: Fabric) -> nn.Module:
    """Return what answers as a network does now, while the network itself goes on to be trained.

    It is a frozen copy, unless all that is trained are adapters that change nothing yet, and can be switched off.
    """
    if isinstance(module, PackedModel) and module.hf is not module.base and not trains_biases(module.hf):
        if fabric.broadcast(change_nothing(module.hf)):  # rank zero may be the only one that has the weights
            return WithoutAdapters(module, fabric)
        log.info("the adapters begin with a part of the weights: the reference is a copy of the model")
    return Frozen(copy.deepcopy(module), fabric)


def change_nothing(hf: Any) -> bool:
    """Whether adapters add zero so far; PiSSA's and OLoRA's begin with a part of the weights."""
    second = [p for name, p in hf.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return not any(p.is_meta or bool(p.any()) for p in second)


def trains_biases(hf: Any) -> bool:
    """Whether peft trains parts of the network itself, which cannot be switched off."""
    return any(config.bias != "none" for config in hf.peft_config.values())
