"""Products of linear layers in 8-bit floating point (fp8), forward and backward, by torchao's layers.

Both sides of a product are scaled by their largest number and rounded to 8 bits; weights, gradients and optimizer stay
as they are, and so do exports (Micikevicius et al., arXiv:2209.05433). A GPU multiplies such numbers at twice the speed
of bfloat16 at best.
"""

import dataclasses
import logging
from typing import Any, Literal

import attrs

from posttrain.errors import RecipeError
from posttrain.runtime.launch import silence_libraries

MULTIPLE = 16
"""What both sizes of a layer must be a multiple of, or its products stay as they are."""
LEAST = (8, 9)
"""Compute capability of the first GPUs with products of fp8: Ada; then Hopper and Blackwell."""
log = logging.getLogger("posttrain")


@attrs.frozen(kw_only=True, slots=False)
class FP8:
    """Compute the products of linear layers in fp8 (extra `qat`), on GPUs since Ada and Hopper. Use it with
    `model.compile`, which joins scaling and rounding: as single operations they cost more than the products save."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """What shares a scale, as torchao calls it: a whole tensor, which is fastest; a row, which is more exact; or a row,
    with the gradients of weights in bfloat16, which is the most exact."""
    emulate: bool = False
    """Compute with numbers of fp8 in float32, to try out what they do where there is no such GPU; it is slow."""

    def check_device(self, device: Any) -> None:
        """Refuse a device that has no products of fp8.

        Raises:
            RecipeError: it has none, and they are not emulated.
        """
        import torch

        if self.emulate:
            return
        if device.type != "cuda":
            found = f"this device, {device.type}, has none"
        elif (capability := torch.cuda.get_device_capability(device)) < LEAST:
            found = f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}"
        else:
            return
        raise RecipeError(
            f"model.fp8: products of fp8 need a GPU of compute capability {'.'.join(map(str, LEAST))} or more (Ada, "
            f"Hopper, Blackwell); {found}. Leave it out, or write fp8: {{emulate: true}} to see what it does to the "
            "loss, slowly"
        )

    def prepare(self, hf: Any) -> None:
        """Have the linear layers of a transformers model multiply in fp8, in place; embeddings and head do not.

        Raises:
            RecipeError: torchao is missing, or much of the layers cannot be multiplied so.
        """
        silence_libraries()
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError:
            raise RecipeError("model.fp8 needs torchao: pip install 'posttrain[qat]'") from None
        from posttrain.blocks.models.quantized.quantize import linear_layers

        layers = linear_layers(hf, "model.fp8", lambda layer: not any(size % MULTIPLE for size in layer.weight.shape))
        named = Float8LinearConfig.from_recipe_name(self.recipe)
        # tokens are what gradients of weights are summed over, and rows are of any length
        config = dataclasses.replace(named, emulate=self.emulate, pad_inner_dim=True)
        convert_to_float8_training(hf, config=config, module_filter_fn=lambda _, name: name in layers)
        how = " (emulated)" if self.emulate else ""
        log.info("%d linear layers multiply in fp8%s, %s; weights stay as they are", len(layers), how, self.recipe)
