"""Floating-point operations of matrix products and attention, counted as they are called; all else is small.

torch's own counter (torch.utils.flop_counter) knows most of them, but not products that are added in place, those of
experts, and attention on CPUs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of all that is called under it, but for what a backward pass computes again.

    A backward pass makes no graph; where it does, it recomputes what a forward pass did not keep.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not (torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1):
            self.operations += operations(function, args, kwargs or {}, out)
        return out


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
        torch.ops.torch_attn._varlen_attn: documents,
        torch.ops.torch_attn._varlen_attn_backward: documents_backward,
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


def documents(
    query: Any, key: Any, value: Any, queries: Any, keys: Any, longest: int, longest_key: int, is_causal: bool = False,
    scale: Any = None, window_size: Any = None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return the operations of attention within documents, [tokens, heads, size] each: a token sees all that its window
    holds, or half of its document on average if it looks back alone."""
    keys = queries if keys is None else keys
    seen = (queries.diff().double() * keys.diff()).sum()  # the pairs of each document
    left, right = window_size or (-1, -1)
    pairs = float(seen) / (2 if is_causal or right == 0 else 1)
    pairs = pairs if left < 0 else min(pairs, len(query) * (left + 1.0))
    return int(2 * query.shape[1] * pairs * (query.shape[-1] + value.shape[-1]))


def documents_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, *bounds: Any, out_val: Any = None
) -> int:
    """Return the operations of its gradient."""
    queries, keys, longest, longest_key, is_causal, _, scale, window = (*bounds, None, None)[:8]
    size, wide = query.shape[-1], value.shape[-1]
    both = documents(query, key, value, queries, keys, longest, longest_key, is_causal, scale, window)
    return int(both * (3 * size + 2 * wide) // (size + wide))
