"""Attention over packed documents: each sees itself alone, and no [length, length] mask is ever built.

Registered with transformers as `packed`. Documents are told by `cu_seq_lens_q`, which transformers
hands from the model's call to every attention layer. On GPUs in half precision it is one
variable-length flash attention (see kernels.py); elsewhere one `scaled_dot_product_attention` per
document. Without these bounds, as in `generate`, it is sdpa.

Documents may branch: `kv_index` names the token of each key, so that a document whose beginning is
computed in another one sees it there (see `batches.branched`).
"""

import functools
import inspect
import itertools
import logging
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask

from posttrain.blocks.models.documents.kernels import DEVICES, LARGEST, head_size, low_precision, variable_length
from posttrain.blocks.parallel.ulysses import divisible, own_columns, whole_rows
from posttrain.errors import TrainingError

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the cache of keys and values, as an argument and in outputs: renamed in 5.24."""
NAME = "packed"
log = logging.getLogger("posttrain")
_on_host = WeakTensorKeyDictionary()
"""Bounds on the device -> the same numbers on the host, so that nobody waits for them."""


def known_on_host(bounds: Tensor | None, numbers: list[int]) -> None:
    """Remember what numbers a tensor of bounds holds, for attention that goes document by document."""
    if bounds is not None and numbers:
        _on_host[bounds] = numbers


def on_host(bounds: Tensor) -> list[int]:
    """Return the numbers of a tensor of bounds."""
    if bounds not in _on_host:
        _on_host[bounds] = bounds.tolist()
    return _on_host[bounds]  # type: ignore[no-any-return]


def no_mask(device: torch.device) -> Tensor:
    """Return what stands for the mask of a packed pass: `cu_seq_lens_q` says what a mask would.

    transformers hands a mask of four dimensions on as it is. Without one it would look for packed documents in the
    positions, and wait for the device to learn whether there are any, in each forward pass.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    kv_index: Tensor | None = None,
    sequence_group: Any = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    image_blocks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        module: the attention layer.
        query: [rows, heads, width, size].
        key, value: [rows, key-value heads, width, size].
        attention_mask: used where there are no bounds.
        dropout: probability, of attention weights.
        scaling: of the scores; 1 / sqrt(size) by default.
        sliding_window: how many of the last tokens are seen; all by default.
        cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], where the queries and keys of each document begin,
            counted over rows * width. Where there are more keys, the queries are the last of its tokens.
        max_length_q, max_length_k: the longest document.
        kv_index: int64 [keys], the token of each key, counted over rows * width; by default they are all tokens.
        sequence_group: ranks that each hold some columns of the rows; bounds are those of whole rows.
        softcap: scores are tanh(score / softcap) * softcap, as in Gemma 2.
        s_aux: [heads], what each head adds to the sum of its exponentials, as in gpt-oss: an attention sink.
        image_blocks: int64 [rows, width], where tokens of one image see each other, as in Gemma 3: the number of the
            image of each token, or -1.
        kwargs: of which `position_bias` is refused.

    Returns:
        [rows, width, heads, size], and None for the weights.

    Raises:
        TrainingError: the model asks for something this does not compute.
    """
    if cu_seq_lens_q is None:
        if isinstance(attention_mask, Tensor) and attention_mask.shape == (1, 1, 1, 1):  # `no_mask`
            _refuse(module, "does not hand `cu_seq_lens_q` to its attention layers")
        if image_blocks is not None:
            attention_mask = _and_images(attention_mask, image_blocks, sliding_window)
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(  # type: ignore[no-any-return]
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        mask = attention_mask
        if mask is None:
            mask = _seen(query.shape[2], key.shape[2], sliding_window, query.device)
        return _scored(query, key, value, mask, dropout, scaling, softcap, s_aux).transpose(1, 2), None
    if sequence_group is not None:
        key, value = (divisible(x, query.shape[1], sequence_group) for x in (key, value))
        query, key, value = (whole_rows(x, sequence_group) for x in (query, key, value))
        if s_aux is not None:  # this rank has some of the heads
            s_aux = s_aux.chunk(dist.get_world_size(sequence_group))[dist.get_rank(sequence_group)]
        whole, _ = packed_attention(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window,
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, softcap=softcap, s_aux=s_aux, **kwargs,
        )  # fmt: skip
        return own_columns(whole, sequence_group), None
    assert cu_seq_lens_k is not None
    if kwargs.get("position_bias") is not None:
        _refuse(module, "uses `position_bias`")
    chunk = _chunk_of(module)
    low = low_precision(query) if query.device.type in DEVICES else None
    if low is not None:
        why = _unfit(query, value, chunk, softcap, image_blocks)
        if why is None:
            if dropout:
                _refuse(module, "uses attention dropout")
            assert max_length_q is not None and max_length_k is not None
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            found = variable_length(
                query, key, value, (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), low, scale,
                sliding_window, kv_index, s_aux,
            )  # fmt: skip
            return found, None
        _say_once(type(module).__name__, why)
    if kv_index is not None:
        assert query.shape[0] == 1, "documents branch within one long row"
        key, value = key.index_select(2, kv_index), value.index_select(2, kv_index)
    blocks = None if image_blocks is None else _blocks(image_blocks, kv_index)
    if chunk is not None and kv_index is not None:
        _refuse(module, "attends in chunks, which documents that branch cannot")
    bounds, how = (cu_seq_lens_q, cu_seq_lens_k), (dropout, scaling, sliding_window, softcap, s_aux)
    return _by_document(query, key, value, bounds, chunk, *how, blocks), None


def _unfit(query: Tensor, value: Tensor, chunk: int | None, softcap: float | None, blocks: Tensor | None) -> str | None:
    """Return why kernels of variable length cannot compute an attention; None if they can."""
    if chunk is not None:
        return "attends in chunks"
    if softcap is not None:
        return "has a soft cap"
    if blocks is not None:
        return "lets the tokens of an image see each other"
    return f"has heads of more than {LARGEST} numbers" if head_size(query, value) > LARGEST else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
@functools.lru_cache
def _say_once(name: str, why: str) -> None:
    log.info("%s %s, which kernels of variable length cannot: documents are computed one by one", name, why)


def _blocks(image_blocks: Tensor, kv_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the image of each query and of each key, counted over rows * width."""
    flat = image_blocks.flatten()
    return flat, flat if kv_index is None else flat.index_select(0, kv_index)


def _chunk_of(module: nn.Module) -> int | None:
    """Return how many tokens a chunk has, if a layer attends in chunks, as in Llama 4: only its mask would say so."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if index is None or not kinds or kinds[index] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)  # type: ignore[union-attr]


def _chunked(bounds: list[int], chunk: int) -> list[int]:
    """Return the bounds of chunks, counted from where each document begins."""
    return [at for begin, end in itertools.pairwise(bounds) for at in range(begin, end, chunk)] + [bounds[-1]]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    chunk: int | None,
    dropout: float,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    blocks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    query_bounds, key_bounds = (on_host(x) if chunk is None else _chunked(on_host(x), chunk) for x in bounds)
    widths = query.shape[2], key.shape[2]
    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for queries, keys in zip(itertools.pairwise(query_bounds), itertools.pairwise(key_bounds), strict=True):
        (row, own), (_, seen) = (_part(*bounds, width) for bounds, width in zip((queries, keys), widths, strict=True))
        if blocks is None:
            mask = _visible(queries[1] - queries[0], keys[1] - keys[0], window, query.device)
        else:
            mask = _seen_by_image(blocks[0][slice(*queries)], blocks[1][slice(*keys)], window)
        q, k, v = query[row : row + 1, :, own], key[row : row + 1, :, seen], value[row : row + 1, :, seen]
        if softcap is not None or sinks is not None:
            if mask is None:
                mask = _seen(q.shape[2], k.shape[2], window, query.device)
            rows[row].append(_scored(q, k, v, mask, dropout, scale, softcap, sinks))
            continue
        grouped = query.shape[1] != key.shape[1]
        rows[row].append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return joined([joined(parts, 2) for parts in rows], 0).transpose(1, 2).contiguous()


def _scored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with the scores written out, where no kernel knows what is done to them: [rows, heads, queries, size]."""
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) if times > 1 else x for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:  # a column that takes its share, and has no value
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return weights[..., : key.shape[2]] @ value


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """Return tensors end to end; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _part(begin: int, end: int, width: int) -> tuple[int, slice]:
    """Return the row of a document, and where in the row it is."""
    row, at = divmod(begin, width)
    return row, slice(at, at + end - begin)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each query sees, [queries, keys]; None if it is all up to itself in a square."""
    return None if queries == keys and (window is None or keys <= window) else _seen(queries, keys, window, device)


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query sees, [queries, keys]: those up to itself, or as many of them as a window holds."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries + 1 - window)


def _seen_by_image(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return which keys each query sees, [queries, keys]: those up to itself and all of its image, inside the window,
    which bounds what lies behind alone, as in transformers.

    Args:
        queries, keys: the image of each token, or -1.
        window: how many of the last tokens are seen.
    """
    count, past = len(queries), len(keys) - len(queries)
    ones = torch.ones(count, len(keys), dtype=torch.bool, device=queries.device)
    seen = ones.tril(past) | ((queries[:, None] == keys) & (queries[:, None] >= 0))
    return seen if window is None else seen & ones.triu(past + 1 - window)


def _and_images(mask: Tensor | None, blocks: Tensor, window: int | None) -> Tensor:
    """Return a mask of rows in which the tokens of an image also see all of it, [rows, 1, width, width].

    Args:
        mask: what each token sees besides; None for all up to itself.
        blocks: int64 [rows, width], the image of each token, or -1.
        window: how many of the last tokens are seen.
    """
    width = blocks.shape[-1]
    mask = _seen(width, width, window, blocks.device) if mask is None else mask
    assert mask.dtype == torch.bool, "masks of sdpa say yes or no"
    same = (blocks[:, None, :, None] == blocks[:, None, None, :]) & (blocks >= 0)[:, None, :, None]
    return mask | (same if window is None else same & torch.ones_like(same).triu(1 - window))


def _refuse(module: nn.Module, why: str) -> None:
    raise TrainingError(
        f"attention `{NAME}` cannot be used: {type(module).__name__} {why}. "
        "Set model.attn_implementation to sdpa, eager, flex_attention or flash_attention_2"
    )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
