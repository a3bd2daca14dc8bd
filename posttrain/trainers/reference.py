"""Trainers that compare the model with one that stays as it is."""

from typing import TYPE_CHECKING

import attrs

from posttrain.blocks.models.model import HFModel
from posttrain.interfaces import ModelBlock
from posttrain.registry import default
from posttrain.trainer import Trainer

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn


@attrs.define(kw_only=True, slots=False, eq=False)
class ReferenceTrainer(Trainer):
    """What trainers with a reference model share."""

    reference: ModelBlock | None = default(HFModel, optional=True, also=("ref_model",))
    """The model to stay close to; by default a frozen copy of `model` as it is at the start, and with LoRA `model`
    without its adapters."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at it."""
        return True

    def build_frozen(self, fabric: "Fabric", model: "nn.Module") -> "dict[str, nn.Module]":
        """Add the reference: a copy of the policy, unless there is a model of its own or adapters to switch off."""
        from posttrain.blocks.models.frozen import reference_of

        frozen = super().build_frozen(fabric, model)
        if self.needs_reference and self.reference is None:
            frozen["reference"] = reference_of(model, fabric)
        return frozen
