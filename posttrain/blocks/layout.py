"""Rows of examples -> one micro-batch of tensors.

Everything that a network or a loss needs to know of the layout is worked out here, once, on the host.
"""

from typing import TYPE_CHECKING, TypeAlias

import attrs

from posttrain.interfaces import Batch

if TYPE_CHECKING:
    import numpy as np

IGNORE = -100
"""The label of a token that is not supervised, as in torch's cross_entropy."""

Document: TypeAlias = "tuple[np.ndarray, np.ndarray]"
"""Token ids and, for each, whether it is supervised."""


@attrs.frozen(eq=False)
class Example:
    """What a row of data became: a document, or several that stay together, such as the sides of a pair."""

    documents: tuple[Document, ...]
    value: float = 0.0
    """A number that came with the row, such as the margin of a pair."""

    def __len__(self) -> int:
        """Return its tokens."""
        return sum(len(ids) for ids, _ in self.documents)


def collate(rows: list[list[Example]], pad_id: int, multiple: int = 1) -> Batch:
    """Return the batch of some rows of examples, whose documents do not depend on each other (see `lay`)."""
    return lay([[document for example in row for document in example.documents] for row in rows], pad_id, multiple)


def lay(rows: list[list[Document]], pad_id: int, multiple: int = 1) -> Batch:
    """Lay rows of documents side by side.

    The padding behind a row is a document of its own, so that `seqlens` covers every position and
    no attention mask is needed. Positions and lengths are derived here, once.

    Args:
        rows: of documents.
        pad_id: what fills rows up.
        multiple: of what the width is one.

    Returns:
        input_ids, labels, position_ids: int64 [rows, width]; labels are not shifted.
        seqlens: int32 [documents], lengths in reading order; cu_seqlens: int32 [documents + 1].
        max_seqlen, max_token: int, the longest document and the highest token.
        ends: int64 [documents but padding], the flat position (row * width + column) of each one's last token.
        supervised: int64 [n], the flat positions that predict a supervised token.
        targets: int64 [n], the tokens they predict.
        streaks, depths: numpy int64 [n], so they stay on the host: how many supervised tokens in a row begin with each
            target, and how far inside its document each of `supervised` is.
        weight, supervised_tokens: n.
        tokens: how many positions are not padding.
        row_lengths: int64 [rows], how many of each row are not.
    """
    import numpy as np
    import torch

    width = -(-max(sum(len(ids) for ids, _ in row) for row in rows) // multiple) * multiple
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    seqlens: list[int] = []
    ends: list[int] = []
    row_lengths: list[int] = []
    for i, row in enumerate(rows):
        at = 0
        for ids, mask in row:
            end = at + len(ids)
            input_ids[i, at:end] = ids
            labels[i, at + 1 : end][mask[1:]] = ids[1:][mask[1:]]  # nothing predicts the first token
            positions[i, at:end] = np.arange(len(ids))
            seqlens.append(len(ids))
            ends.append(i * width + end - 1)
            at = end
        row_lengths.append(at)
        if at < width:
            positions[i, at:] = np.arange(width - at)
            seqlens.append(width - at)
    flat = labels.reshape(-1)
    predicted = np.flatnonzero(flat != IGNORE)
    cu_seqlens = np.zeros(len(seqlens) + 1, dtype=np.int32)
    np.cumsum(seqlens, out=cu_seqlens[1:])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "seqlens": torch.tensor(seqlens, dtype=torch.int32),
        "cu_seqlens": torch.from_numpy(cu_seqlens),
        "max_seqlen": max(seqlens),
        "max_token": int(input_ids.max()),
        "ends": torch.tensor(ends, dtype=torch.int64),
        "supervised": torch.from_numpy(predicted - 1),
        "targets": torch.from_numpy(flat[predicted]),
        "streaks": streaks(predicted),
        "depths": positions.reshape(-1)[predicted - 1],
        "weight": len(predicted),
        "supervised_tokens": len(predicted),
        "tokens": sum(row_lengths),
        "row_lengths": torch.tensor(row_lengths),
    }


def streaks(indices: "np.ndarray") -> "np.ndarray":
    """Return how many consecutive numbers begin with each of some ascending ones.

    >>> import numpy as np
    >>> streaks(np.array([3, 4, 5, 9, 11, 12])).tolist()
    [3, 2, 1, 1, 2, 1]
    """
    import numpy as np

    ends = np.flatnonzero(np.diff(indices, append=-1) != 1)  # the last of each run
    return ends[np.searchsorted(ends, np.arange(len(indices)))] - np.arange(len(indices)) + 1


def collate_pairs(rows: list[list[Example]], pad_id: int, packing: bool = True) -> Batch:
    """Return the batch of some rows of pairs: examples of two documents, the chosen side and the rejected one.

    Args:
        rows: of pairs.
        pad_id: what fills rows up.
        packing: whether a row's sides lie side by side; otherwise each has a row of its own, padded.

    Returns:
        What `lay` returns, except that `weight` is the number of pairs, and:
        pairs: their number.
        side: int64 [n], for each supervised token 2 * pair, or 2 * pair + 1 on the rejected side.
        lengths: float32 [pairs, 2], the supervised tokens of both sides.
        margins: float32 [pairs], the value of each example.
        ends_with_padding: whether the last token of any side is the padding token.
        branch: with packing, the layout in which what both sides begin with is there only once (see `branched`).
    """
    import numpy as np
    import torch

    pairs = [example for row in rows for example in row]
    sides = [[document for example in row for document in example.documents] for row in rows]
    batch = lay(sides if packing else [[document] for row in sides for document in row], pad_id)
    counts = np.array([int(mask[1:].sum()) for row in sides for _, mask in row])
    batch |= {
        "weight": len(pairs),
        "pairs": len(pairs),
        "side": torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        "lengths": torch.from_numpy(counts.astype(np.float32).reshape(-1, 2)),
        "ends_with_padding": bool((batch["input_ids"].view(-1)[batch["ends"]] == pad_id).any()),
        "margins": torch.tensor([pair.value for pair in pairs], dtype=torch.float32),
    }
    return batch | {"branch": branched(batch, [len(ids) for row in sides for ids, _ in row])} if packing else batch


def branched(batch: Batch, sizes: list[int]) -> Batch:
    """Return a batch of pairs without padding, and with the tokens that both sides of a pair begin with only once.

    The chosen side is a document as before. The rejected side goes on from the common beginning: its queries are
    its own tokens, its keys those of the beginning and its own. Where a token of the beginning predicts a token of
    either side, its one position does it for both.

    Args:
        batch: pairs, as `lay` laid them.
        sizes: tokens of each side.

    Returns:
        input_ids, position_ids: int64 [1, tokens].
        kv_index: int64 [keys], the token of each key, query by query; cu_seqlens, cu_seqlens_k: int32 [sides + 1],
            where the queries and the keys of each side begin; max_seqlen, max_seqlen_k: their greatest lengths.
        supervised, ends: as those of the batch, in this layout.
    """
    import numpy as np
    import torch

    ids = batch["input_ids"].numpy().reshape(-1)
    begins = batch["ends"].numpy() - np.array(sizes) + 1
    place = np.zeros(len(ids), dtype=np.int64)  # where each token of the batch is here
    kept, keys, queries, lengths, total = [], [], [], [], 0
    for chosen, rejected in zip(range(0, len(sizes), 2), range(1, len(sizes), 2), strict=True):
        shared = common(*(ids[begins[side] : begins[side] + sizes[side]] for side in (chosen, rejected)))
        for side, known in ((chosen, 0), (rejected, shared)):
            own = np.arange(begins[side] + known, begins[side] + sizes[side])
            place[own] = np.arange(total, total + len(own))
            place[begins[side] : begins[side] + known] = place[begins[chosen] : begins[chosen] + known]
            kept.append(own)
            keys.append(place[begins[side] : begins[side] + sizes[side]])
            queries.append(len(own))
            lengths.append(sizes[side])
            total += len(own)
    index = np.concatenate(kept)
    return {
        "input_ids": batch["input_ids"].view(1, -1)[:, index],
        "position_ids": batch["position_ids"].view(1, -1)[:, index],
        "kv_index": torch.from_numpy(np.concatenate(keys)),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *queries], dtype=np.int32)),
        "cu_seqlens_k": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "max_seqlen": max(queries),
        "max_seqlen_k": max(lengths),
        "supervised": torch.from_numpy(place[batch["supervised"].numpy()]),
        "ends": torch.from_numpy(place[batch["ends"].numpy()]),
    }


def common(one: "np.ndarray", other: "np.ndarray") -> int:
    """Return with how many of the same tokens both begin, not counting the last token of either.

    >>> import numpy as np
    >>> common(np.array([5, 6, 7, 8]), np.array([5, 6, 9])), common(np.array([5, 6]), np.array([5, 6]))
    (2, 1)
    """
    import numpy as np

    length = min(len(one), len(other)) - 1
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
