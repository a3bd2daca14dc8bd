"""Flash attention of variable length on the CPU, below torch's own front, and as strict as the kernels of GPUs.

What `torch.nn.attention.varlen` checks, saves for the backward pass and tells the compiler is torch's own then; the two
operations it ends in are written out here, with the checks of `mha_varlen_fwd` and `mha_varlen_bwd` (flash_api.cpp).
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from posttrain.blocks.models.documents import kernels

calls: Counter[str] = Counter()
"""How often each was called since `emulated` began."""


def checked(tensors: dict[str, Tensor], bounds: tuple[Tensor, Tensor], longest: tuple[int, int]) -> None:
    """Fail as the kernels would, or where they would read what is not there."""
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    assert q.dtype in (torch.float16, torch.bfloat16), f"only support fp16 and bf16 data type, not {q.dtype}"
    for name, x in tensors.items():
        assert x.dtype == q.dtype, f"query and {name} must have the same dtype, not {q.dtype} and {x.dtype}"
        assert x.ndim == 3 and x.stride(-1) == 1, f"{name} must have contiguous last dimension: {x.shape} {x.stride()}"
        assert all(s % 8 == 0 for s in x.stride()[:2]) and x.data_ptr() % 16 == 0, f"{name} is misaligned: {x.stride()}"
    size = q.shape[-1]
    assert size % 8 == 0, f"head_size must be a multiple of 8, not {size}"
    assert size <= 256, f"only supports head dimension at most 256, not {size}"
    assert k.shape == v.shape and k.shape[-1] == size, f"k and v must have shape [keys, heads, {size}]"
    assert q.shape[1] % k.shape[1] == 0, "number of heads in key/value must divide number of heads in query"
    for given, x, most in zip(bounds, (q, k), longest, strict=True):
        assert given.dtype == torch.int32, f"bounds must have dtype int32, not {given.dtype}"
        assert given.is_contiguous() and given.device == x.device and given.ndim == 1 and len(given) > 1
        assert int(given[0]) == 0 and int(given[-1]) == len(x), f"bounds go from 0 to {len(x)}: {given.tolist()}"
        lengths = given.diff()
        assert int(lengths.min()) >= 0 and int(lengths.max()) <= most, (
            f"documents of {lengths.tolist()}, longest {most}"
        )
    assert len(bounds[0]) == len(bounds[1])


def documents(bounds: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, slice]]:
    """Yield where the queries and the keys of each document are."""
    pairs = (itertools.pairwise(given.tolist()) for given in bounds)
    return ((slice(*queries), slice(*keys)) for queries, keys in zip(*pairs, strict=True))


def scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: tuple[int, int]) -> Tensor:
    """Return the scores of one document, [heads, queries, keys] in float32; what is not seen is -inf."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    place = torch.arange(len(q))[:, None] + len(k) - len(q)
    other = torch.arange(len(k))[None]
    left, right = window[0], 0 if causal else window[1]
    hidden = (other > place + right) if right >= 0 else torch.zeros(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (other < place - left)
    return found.masked_fill(hidden, float("-inf"))


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    return_debug_mask: bool, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **more: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_flash_attention_forward."""
    calls["forward"] += 1
    assert dropout == 0.0 and not any(value is not None for value in more.values())
    checked({"q": q, "k": k, "v": v}, (cu_q, cu_k), (max_q, max_k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    out, total = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for own, seen in documents((cu_q, cu_k)):
        s = scores(q[own], k[seen], scale, causal, window)
        values = v[seen].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[own] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values).to(q.dtype)
        total[:, own] = s.logsumexp(-1)
    return out, total, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), torch.empty(0)


def backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, dropout: float, causal: bool, rng_state: Tensor, unused: Tensor, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """aten::_flash_attention_backward."""
    calls["backward"] += 1
    checked({"q": q, "k": k, "v": v, "out": out, "dout": slope}, (cu_q, cu_k), (max_q, max_k))
    assert slope.shape == out.shape == q.shape
    assert total.dtype == torch.float32 and total.shape == (q.shape[1], len(q)) and total.is_contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = (
        -1 if window_size_left is None else window_size_left,
        -1 if window_size_right is None else window_size_right,
    )
    times = q.shape[1] // k.shape[1]
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for own, seen in documents((cu_q, cu_k)):
        p = (scores(q[own], k[seen], scale, causal, window) - total[:, own, None]).exp()
        up, keys, values = slope[own].float(), *(x[seen].float().repeat_interleave(times, 1) for x in (k, v))
        sums = (up * out[own].float()).sum(-1).t()[..., None]  # [heads, queries, 1]
        ds = p * (torch.einsum("qhd,khd->hqk", up, values) - sums) * scale
        grads[0][own] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
        for place, found in (
            (1, torch.einsum("hqk,qhd->khd", ds, q[own].float())),
            (2, torch.einsum("hqk,qhd->khd", p, up)),
        ):
            grads[place][seen] = found.unflatten(1, (k.shape[1], times)).sum(2).to(q.dtype)
    return grads


@contextmanager
def kernels_on(device: str) -> Iterator[None]:
    """Let a device have kernels of variable length meanwhile."""
    kernels.DEVICES.add(device)
    try:
        yield
    finally:
        kernels.DEVICES.discard(device)


@contextmanager
def emulated() -> Iterator[Counter[str]]:
    """Let the CPU have these kernels meanwhile, and yield how often they are called."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    calls.clear()
    try:
        with kernels_on("cpu"):
            yield calls
    finally:
        library._destroy()
