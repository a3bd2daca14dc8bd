"""Training for a model that will be quantized (QAT): products are computed with the numbers that it will have then.

Weights stay as they are and are trained; in the forward pass torchao rounds them, and if asked the inputs of layers, as
the quantized model does, and the backward pass leaves the rounding out (straight-through, Bengio et al.,
arXiv:1308.3432). So what rounding loses is learned again (Jacob et al., arXiv:1712.05877; Liu et al.,
arXiv:2305.17888).
"""

from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs.validators import gt

from posttrain.errors import RecipeError
from posttrain.registry import key
from posttrain.runtime.launch import silence_libraries

if TYPE_CHECKING:
    from torch import nn


@attrs.frozen(kw_only=True, slots=False)
class QAT:
    """Train weights that will be quantized by torchao (extra `qat`), as `posttrain quantize` does it."""

    weights: Literal["int4", "int8"] = key("int4", also=("weight_dtype",))
    """Numbers of the layers' matrices, with a scale for each group of `group_size`."""
    activations: Literal["int8"] | None = key(None, also=("activation_dtype",))
    """Numbers of what enters a layer, with a scale for each token; by default it is not rounded."""
    group_size: int = key(32, check=gt(0))
    """Numbers of a row of a matrix that share a scale; must divide the width of every layer."""

    def config(self) -> Any:
        """Return what torchao calls it.

        Raises:
            RecipeError: torchao is missing.
        """
        import torch

        silence_libraries()
        try:
            from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerGroup
        except ImportError:
            raise RecipeError("model.qat needs torchao: pip install 'posttrain[qat]'") from None
        numbers, scales = getattr(torch, self.weights), PerGroup(self.group_size)
        if self.activations:
            return Int8DynamicActivationIntxWeightConfig(weight_dtype=numbers, weight_granularity=scales)
        return IntxWeightOnlyConfig(weight_dtype=numbers, granularity=scales)

    def prepare(self, hf: Any) -> None:
        """Have the linear layers of a transformers model round their numbers, in place; embeddings and head do not.

        Raises:
            RecipeError: torchao is missing, or much of the layers cannot be quantized so.
        """
        config, chosen = self.config(), self.chosen(hf)
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(hf, QATConfig(config, step="prepare"), filter_fn=lambda _, name: name in chosen)

    def chosen(self, hf: Any) -> dict[str, "nn.Linear"]:
        """Return the layers to quantize, by their names in the model.

        Raises:
            RecipeError: their widths are no multiples of `group_size`, or much would stay as it is.
        """
        from posttrain.blocks.models.quantized.quantize import linear_layers

        found = linear_layers(hf, "model.qat")
        odd = {name: module.in_features for name, module in found.items() if module.in_features % self.group_size}
        if odd:
            name, width = next(iter(odd.items()))
            raise RecipeError(f"model.qat.group_size: {self.group_size} does not divide {width:,}, the width of {name}")
        return found
