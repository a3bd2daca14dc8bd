"""The layers of a transformers model made bytes: linear ones, and stacks of experts; what is left must be little."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from posttrain.blocks.models.documents.ways import decoder_of, head_of
from posttrain.blocks.models.quantized.layers import Code, Kind, Numbers, QuantizedLinear, Remade, codes
from posttrain.errors import RecipeError
from posttrain.runtime.bnb import require

log = logging.getLogger("posttrain")
LEFT = 0.1
"""Share of the layers' numbers that may stay as they are, such as norms, routers and convolutions."""


def prepare(hf: Any, kind: Kind, double: bool, dtype: str, fabric: Any, remade: bool) -> None:
    """Quantize a transformers model for training, on the run's device, and keep the rest in a type of torch's.

    Under a mixed precision, norms and other vectors stay in float32, as k-bit training does it.

    Args:
        hf: as it was loaded.
        kind: of the numbers.
        double: whether scales are quantized too.
        dtype: of embeddings and head.
        fabric: of the run; None outside of one.
        remade: see `quantize`.
    """
    device = fabric.device if fabric is not None and fabric.device.type == "cuda" else None
    quantize(hf, kind, double, device, remade)
    mixed = fabric is not None and "mixed" in fabric.strategy.precision.precision
    for parameter in hf.parameters():
        if parameter.is_floating_point():
            wanted = torch.float32 if mixed and parameter.ndim < 2 else getattr(torch, dtype)
            parameter.data = parameter.data.to(wanted)
    stacks = sum(isinstance(part, Numbers) for part in hf.modules())
    if stacks:
        log.info("%d stacks of experts are kept as bytes, and take no adapters", stacks)


def quantize(hf: Any, kind: Kind, double: bool, device: torch.device | None = None, remade: bool = True) -> None:
    """Quantize the linear layers and experts of a transformers model in place; embeddings and heads stay.

    Args:
        hf: the model, on any device, or on none (meta).
        kind: of the numbers.
        double: whether scales are quantized too, in 4 bit.
        device: where to compute it; by default where the weights are.
        remade: whether what products keep for the backward pass is made again, unless layers are as a whole.

    Raises:
        RecipeError: bitsandbytes is missing, or much of the layers would stay as it is.
    """
    require("model.quantize")
    hf.requires_grad_(False)
    for module, linear, stacked in targets(hf):
        for name, child in linear.items():
            setattr(module, name, QuantizedLinear(child, kind, double, device))
        for name, weight in stacked.items():
            numbers = Numbers(Code(kind, double, tuple(weight.shape)), weight.dtype, device)
            parametrize.register_parametrization(module, name, numbers, unsafe=True)
        if stacked:
            module.forward = Remade(module, remade)
    refuse_rest(decoder_of(hf))


def targets(hf: Any) -> Iterator[tuple[nn.Module, dict[str, nn.Linear], dict[str, nn.Parameter]]]:
    """Yield modules with what is to be quantized of them, by name: linear layers, and stacks of matrices."""
    head = head_of(hf)  # its outputs are too fine for it
    for module in list(decoder_of(hf).modules()):
        linear = {
            name: child for name, child in module.named_children()
            if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward and child is not head
        }  # fmt: skip
        stacked = {name: p for name, p in module._parameters.items() if p is not None and is_stack(module, p)}
        if linear or stacked:
            yield module, linear, stacked


def linear_layers(hf: Any, key: str, fits: Callable[[nn.Linear], bool] = lambda layer: True) -> dict[str, nn.Linear]:
    """Return the linear layers of a transformers model by their names, but for embeddings and heads.

    Args:
        hf: the model.
        key: of the recipe that asks, for messages.
        fits: whether a layer can be used.

    Raises:
        RecipeError: much of the model would be left out.
    """
    decoder, linear = decoder_of(hf), {id(each) for _, found, _ in targets(hf) for each in found.values()}
    found = {n: m for n, m in hf.named_modules() if isinstance(m, nn.Linear) and id(m) in linear and fits(m)}
    embedded = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Embedding))
    every = sum(parameter.numel() for parameter in decoder.parameters()) - embedded
    if (left := every - sum(module.weight.numel() for module in found.values())) > LEFT * every:
        raise RecipeError(
            f"{key}: {left:,} of {every:,} numbers of the layers are in none of the {len(found)} linear layers that "
            "can be used, and would stay as they are, such as stacks of experts"
        )
    return found


@torch.no_grad()
def round_weights(hf: Any, kind: Kind, double: bool) -> None:
    """Give a transformers model, in place, the numbers that its quantized form computes with."""
    require("an adapter that was trained on a quantized base")
    for _, linear, stacked in targets(hf):
        for weight in (*(child.weight for child in linear.values()), *stacked.values()):
            if not weight.is_meta:
                code = Code(kind, double, tuple(weight.shape))
                weight.copy_(code.read(*code.write(weight, weight.device), weight.dtype))


def is_stack(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is a stack of matrices, such as one for each expert."""
    plain = not isinstance(module, nn.modules.conv._ConvNd | QuantizedLinear)
    return plain and parameter.ndim == 3 and parameter.is_floating_point()


def refuse_rest(decoder: nn.Module) -> None:
    """Refuse a model of whose layers much could not be quantized.

    Raises:
        RecipeError: it is more than `LEFT`.
    """
    inside = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    left = {name: p.numel() for name, p in decoder.named_parameters() if p.dtype != torch.uint8 and id(p) not in inside}
    done = sum(written(decoder).values())
    if sum(left.values()) > LEFT * (done + sum(left.values())):
        names = sorted(left, key=lambda name: -left[name])[:3]
        raise RecipeError(
            f"model.quantize: {sum(left.values()):,} of {done + sum(left.values()):,} numbers of the layers would stay "
            f"as they are, such as {', '.join(names)}: they are neither linear layers nor stacks of experts"
        )


def written(module: nn.Module) -> dict[str, int]:
    """Return how many numbers each kind of code stands for in a network."""
    found: dict[str, int] = {}
    for code in codes(module):
        found[code.kind] = found.get(code.kind, 0) + math.prod(code.shape)
    return found
