"""Attention over rows that lie on several ranks: heads are exchanged for columns, and back (arXiv:2309.14509)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, out = group, torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (slope,) = upstream
        out = torch.empty_like(slope, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, slope.contiguous(), group=ctx.group)
        return out, None


def whole_rows(x: Tensor, group: Any) -> Tensor:
    """Return some heads of whole rows, [rows, heads / ranks, width * ranks, size].

    Args:
        x: [rows, heads, width, size], all heads of this rank's columns.
        group: ranks whose columns make up the rows.
    """
    ranks = dist.get_world_size(group)
    parts = x.reshape(x.shape[0], ranks, -1, *x.shape[2:]).movedim(1, 0)  # [ranks, rows, heads / ranks, width, size]
    parts = parts.contiguous()
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)  # type: ignore[no-any-return, no-untyped-call]


def own_columns(x: Tensor, group: Any) -> Tensor:
    """Return all heads of this rank's columns, [rows, width, heads, size].

    Args:
        x: [rows, width * ranks, heads / ranks, size], some heads of whole rows.
        group: ranks whose columns make up the rows.
    """
    ranks = dist.get_world_size(group)
    parts = x.reshape(x.shape[0], ranks, -1, *x.shape[2:]).movedim(1, 0)  # [ranks, rows, width, heads / ranks, size]
    parts = parts.contiguous()
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)  # type: ignore[no-any-return, no-untyped-call]


def divisible(x: Tensor, heads: int, group: Any) -> Tensor:
    """Return keys or values with each head as often as it takes to divide them among the ranks.

    Args:
        x: [rows, key-value heads, width, size].
        heads: of the queries, a multiple of the ranks.
        group: of the ranks.
    """
    ranks, own = dist.get_world_size(group), x.shape[1]
    if own % ranks == 0:
        return x
    times = ranks // own if ranks % own == 0 else heads // own
    return x.repeat_interleave(times, dim=1)
