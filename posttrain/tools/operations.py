"""Floating-point operations of matrix products and attention, counted as they are called; all else is small.

torch's own counter (torch.utils.flop_counter) knows most of them, but not products that are added in place, those of
experts, and attention on CPUs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def operations(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return what one call of an operator computes: a multiplication and an addition are two operations."""
    formula = formulas().get(getattr(function, "_overloadpacket", None))
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


@cache
def formulas() -> dict[Any, Callable[..., int]]:
    """Return how operators are counted."""
    return {
        **flop_registry,
        aten.addmm_: flop_registry[aten.addmm],  # as losses sum the gradients of their chunks
        aten._grouped_mm: grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }


def grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Return the operations of a product whose rows go to one of several matrices each, or whose columns are summed in
    groups: either way every number of the left is used once for each column of the right."""
    return int(2 * left.numel() * right.shape[-1])


def attention(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    """Return the operations of attention, [batch, heads, length, size] each: two products, half of each if causal."""
    *first, length, size = query.shape
    both = 2 * length * key.shape[-2] * (size + value.shape[-1])
    return int(torch.Size(first).numel() * both) // (2 if is_causal else 1)


def attention_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, dropout: float = 0.0, is_causal: bool = False,
    **_: Any,
) -> int:  # fmt: skip
    """Return the operations of its gradient: the scores again, and two products for each of the two."""
    size, wide = query.shape[-1], value.shape[-1]
    return int(attention(query, key, value, dropout, is_causal) * (3 * size + 2 * wide) // (size + wide))
