"""A base of 4 or 8 bits under adapters (QLoRA, Dettmers et al., arXiv:2305.14314), with the kernels of bitsandbytes.

Everything that a quantized matrix is made of lies in flat parameters of bytes: no precision casts them, FSDP cuts them
like any other rows, and a pass through the network needs nothing but them. A matrix is turned back into numbers for
the product in hand, once in the forward and once in the backward pass, and is not kept in between.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.utils import parametrize

from posttrain.runtime.bnb import dynamic_map

Kind: TypeAlias = Literal["nf4", "fp4", "int8"]
BLOCK = 64
"""Numbers that share a scale."""
OUTER = 256
"""Scales that share a scale, with double quantization."""


@attrs.frozen
class Code:
    """How the numbers of one tensor are written in bytes."""

    kind: Kind
    double: bool
    shape: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of the codes, of their scales, and of the scales' scales."""
        count = math.prod(self.shape)
        if self.kind == "int8":
            return count, 4 * (count // self.shape[-1]), 0
        blocks = -(-count // BLOCK)
        return -(-count // 2), blocks if self.double else 4 * blocks, 4 * (-(-blocks // OUTER) + 1) * self.double

    def write(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return a tensor as bytes: codes, scales, and the scales' scales with their offset (perhaps none)."""
        if weight.is_meta:
            return tuple(torch.empty(size, dtype=torch.uint8, device="meta") for size in self.sizes)  # type: ignore[return-value]
        from bitsandbytes import functional as kernels

        values, none = weight.detach().to(device).contiguous(), torch.empty(0)
        if self.kind == "int8":  # each row by its largest number, as LLM.int8 does it (arXiv:2208.07339)
            rows = values.float().flatten(0, -2)
            scales = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
            found = ((rows / scales[:, None] * 127).round().to(torch.int8), scales, none)
        else:
            codes, state = kernels.quantize_4bit(
                values.float(), blocksize=BLOCK, quant_type=self.kind, compress_statistics=self.double
            )
            outer = torch.cat([state.state2.absmax, state.offset.view(1)]) if self.double else none
            found = codes, state.absmax, outer
        return tuple(part.flatten().contiguous().view(torch.uint8).to(weight.device) for part in found)  # type: ignore[return-value]

    def read(self, codes: Tensor, scales: Tensor, outer: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers that bytes stand for, [*shape]."""
        if self.kind == "int8":
            rows = codes.view(torch.int8).view(-1, self.shape[-1]) * (scales.view(torch.float32) / 127)[:, None]
            return rows.to(dtype).view(self.shape)
        kernels, known = torch.ops.bitsandbytes, dtype if dtype.itemsize < 8 else torch.float32
        if self.double:
            least, levels = outer.view(torch.float32), dynamic_map(str(scales.device))
            scales = kernels.dequantize_blockwise(scales, least[:-1], levels, OUTER, torch.float32) + least[-1]
        else:
            scales = scales.view(torch.float32)
        found: Tensor = kernels.dequantize_4bit(codes.view(-1, 1), scales, BLOCK, self.kind, self.shape, known)
        return found.to(dtype)


class Product(torch.autograd.Function):
    """x @ weight.T + bias, with the weight kept as bytes; only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, code: Code, *parts: Tensor) -> Tensor:
        """Return [..., out] of [..., in], in the precision of autocast or of x."""
        ctx.code, ctx.given = code, x.dtype
        ctx.save_for_backward(*parts)
        x = x.to(computed_in(x))
        codes, scales, outer = parts
        return F.linear(x, code.read(codes, scales, outer, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        parts = ctx.saved_tensors  # once: checkpointing makes them again at each look
        weight = ctx.code.read(*parts, gradient.dtype)
        return (gradient @ weight).to(ctx.given), *(None for _ in range(2 + len(parts)))


def computed_in(x: Tensor) -> torch.dtype:
    """Return the precision of products: that of autocast, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as bytes; peft adapts it like any other."""

    def __init__(self, linear: nn.Linear, kind: Kind, double: bool, device: torch.device | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.code = Code(kind, double, tuple(linear.weight.shape))
        weight, scales, outer = self.code.write(linear.weight, device or linear.weight.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.outer = nn.Parameter(outer, requires_grad=False) if outer.numel() else None
        self.bias = linear.bias

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the weight is made of."""
        return self.weight, self.scales, self.weight[:0] if self.outer is None else self.outer

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        return Product.apply(x, self.bias, self.code, *self.parts)  # type: ignore[no-any-return, no-untyped-call]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the layer computes with, [out, in]."""
        return self.code.read(*self.parts, dtype)

    def extra_repr(self) -> str:
        """Say what it is."""
        return f"{self.in_features}, {self.out_features}, {self.code.kind}"


class Numbers(nn.Module):
    """The numbers behind a parameter of three dimensions, such as the experts of a layer."""

    def __init__(self, code: Code, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.code, self.dtype, self.device = code, dtype, device
        self.newest: tuple[Any, tuple[Tensor, ...]] = (None, ())
        """A weak reference to the storage that `forward` made last, so that its address is given to no other, and the
        bytes that it was made of."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the bytes of a tensor."""
        return tuple(part for part in self.code.write(weight, self.device or weight.device) if part.numel())

    def forward(self, *parts: Tensor) -> Tensor:
        """Return the tensor, in the precision of products."""
        codes, scales, outer = (*parts, parts[0][:0])[:3]
        kind = codes.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        found = self.code.read(codes, scales, outer, dtype)
        self.newest = StorageWeakRef(found.untyped_storage()), parts  # type: ignore[no-untyped-call]
        return found


class Remade:
    """For the passes of a module with `Numbers`: they are made once for a pass, and again for the backward pass, so
    that its products keep none of them; unless its layer is computed again as a whole."""

    def __init__(self, owner: nn.Module, again: bool) -> None:
        self.owner, self.forward, self.again = owner, owner.forward, again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack) if self.again else nullcontext()
        with parametrize.cached(), hooks:
            return self.forward(*args, **kwargs)

    def pack(self, tensor: Tensor) -> Any:
        """Return how to make a tensor again, if it is a view of a weight."""
        storage = tensor.untyped_storage()._cdata
        for numbers in (part for part in self.owner.modules() if isinstance(part, Numbers)):
            if numbers.newest[0] is not None and numbers.newest[0].cdata == storage:
                where = tensor.shape, tensor.stride(), tensor.storage_offset()
                return numbers.code, numbers.newest[1], tensor.dtype, where
        return tensor

    def unpack(self, kept: Any) -> Tensor:
        """Return what was packed."""
        if isinstance(kept, Tensor):
            return kept
        code, parts, dtype, where = kept
        return code.read(*(*parts, parts[0][:0])[:3], dtype).as_strided(*where)  # type: ignore[no-any-return]


def codes(module: nn.Module) -> Iterator[Code]:
    """Yield the codes of what is quantized in a network."""
    return (part.code for part in module.modules() if isinstance(part, QuantizedLinear | Numbers))
