"""The kernels that GPUs have for packed rows: attention of variable length, in the precision of autocast."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

DEVICES = {"cuda"}
"""Where there are kernels of variable length; tests emulate them elsewhere."""
LARGEST, MULTIPLE = 256, 8
"""What the size of a head may be at most, and is filled up to a multiple of."""
_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch 2.11 shares keys and values between heads without being told to."""


def low_precision(x: Tensor) -> torch.dtype | None:
    """Return the half precision that is computed in: the one of autocast, or the tensor's own; None if it is neither.

    Rotary embeddings leave queries and keys in float32 while values are in half precision.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    window: int | None,
    kv_index: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend causally within each document, with one kernel for all.

    Args:
        query: [rows, heads, width, size].
        key, value: [rows, key-value heads, width, size]; values may differ in size.
        bounds: int32 [documents + 1] each, where the queries and keys of each document begin.
        longest: the most queries and keys that a document has.
        dtype: float16 or bfloat16.
        scale: of the scores.
        window: how many of the last tokens are seen; all by default.
        kv_index: int64 [keys], the token of each key; by default they are all tokens.
        sinks: [heads], what each head adds to the sum of its exponentials.

    Returns:
        [rows, width, heads, size of the values].
    """
    rows, heads, width, _ = query.shape
    filled = head_size(query, value)
    q, k, v = (F.pad(x.to(dtype).transpose(1, 2).flatten(0, 1), (0, filled - x.shape[-1])) for x in (query, key, value))
    if kv_index is not None:
        k, v = k.index_select(0, kv_index), v.index_select(0, kv_index)
    seen = (-1 if window is None else window - 1, 0)
    more: dict[str, Any] = {"scale": scale, "window_size": seen}
    if _GQA and heads != key.shape[1]:
        more["enable_gqa"] = True
    if sinks is None:
        out: Any = varlen_attn(q, k, v, *bounds, *longest, **more)
    else:
        out = _WithSinks.apply(q, k, v, sinks, bounds, longest, more)  # type: ignore[no-untyped-call]
    return out[..., : value.shape[-1]].reshape(rows, width, heads, -1)  # type: ignore[no-any-return]


def head_size(query: Tensor, value: Tensor) -> int:
    """Return the size of heads that kernels are given: one for queries and values, and a multiple of what they want."""
    return -(-max(query.shape[-1], value.shape[-1]) // MULTIPLE) * MULTIPLE


class _WithSinks(torch.autograd.Function):
    """Attention in which each head has a score that no token has, as in gpt-oss.

    The sum of exponentials then has one more member, which scales the result. torch gives no gradient for that sum; but
    what goes backward through a softmax only needs the sum and the result as they are in the end, and so do kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bounds: Any, longest: Any, more: dict[str, Any]
    ) -> Tensor:
        out, lse = varlen_attn(q, k, v, *bounds, *longest, return_aux=AuxRequest(lse=True), **more)
        total = torch.logaddexp(lse, sinks.float()[:, None])  # [heads, tokens]
        out = out * (lse - total).exp().t()[..., None].to(out.dtype)  # [tokens, heads, size]
        ctx.save_for_backward(q, k, v, sinks, out, total, *bounds)
        ctx.longest, ctx.more = longest, more
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, total, *bounds = ctx.saved_tensors
        slope, (left, right) = upstream[0].contiguous(), ctx.more["window_size"]
        dropped, unused = (q.new_zeros(n, dtype=t) for n, t in ((2, torch.uint64), (0, torch.float32)))
        grads = torch.ops.aten._flash_attention_backward(
            slope, q, k, v, out, total, *bounds, *ctx.longest, 0.0, left < 0, dropped, unused,
            scale=ctx.more["scale"], window_size_left=left, window_size_right=right,
        )  # fmt: skip
        share = (sinks.float()[:, None] - total).exp()  # [heads, tokens]
        each = (slope.float() * out.float()).sum(-1).t()
        return *grads, -(share * each).sum(1).to(sinks.dtype), None, None, None
