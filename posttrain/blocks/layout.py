"""Rows of examples -> one micro-batch of tensors.

Everything that a network or a loss needs to know of the layout is worked out here, once, on the host.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from posttrain.batch import Batch, Extra, Layout, Per

if TYPE_CHECKING:
    import numpy as np

IGNORE = -100
"""The label of a token that is not supervised, as in torch's cross_entropy."""

Document: TypeAlias = "tuple[np.ndarray, np.ndarray]"
"""Token ids and, for each, whether it is supervised."""


@attrs.frozen
class Column:
    """Values that examples carry beside their tokens: what there is one of, and how they are stored."""

    per: Per
    """token: [tokens, *shape] of each document; it reaches the batch as [rows, width, *shape], zero in the padding.
    target: the same, but it reaches the batch in the order of `targets`, [n, *shape]. document: [*shape] of each.
    span: of each document a list of objects, which say with `at` and `length` for which of its tokens they stand, and
    with `hash` for what. No cut falls inside of one. They are plain data; the batch gets a list for each document.
    example: [*shape], or any JSON data."""
    dtype: str = "float32"
    """numpy's name of the type; `json` for plain data of an example, which stay on the host, as a list."""
    shape: tuple[int, ...] = ()
    argument: bool = False
    """Whether the network takes it, by its name, instead of the loss."""


Columns: TypeAlias = Mapping[str, Column]


@attrs.frozen(eq=False)
class Example:
    """What a row of data became: a document, or several that stay together, such as the sides of a pair."""

    documents: tuple[Document, ...]
    values: dict[str, Any] = attrs.field(factory=dict)
    """Of each column: per token, target and document a tuple with an entry for each document; per example a value."""

    def __len__(self) -> int:
        """Return its tokens."""
        return sum(len(ids) for ids, _ in self.documents)

    def alike(self, columns: Columns) -> bool:
        """Whether all documents hold the same tokens, which stand for the same."""
        import numpy as np

        names = [name for name, column in columns.items() if column.per == "span"]
        (first, _), *others = self.documents
        hashes = [[[span["hash"] for span in spans] for spans in self.values[name]] for name in names]
        same = all(one == each[0] for each in hashes for one in each)
        return same and all(np.array_equal(ids, first) for ids, _ in others)

    def cut(self, parts: list[slice], columns: Columns) -> "Example":
        """Return the example with a part of each document, and the values of these parts."""
        documents = tuple((ids[part], mask[part]) for (ids, mask), part in zip(self.documents, parts, strict=True))
        values = dict(self.values)
        for name, column in columns.items():
            if column.per in ("token", "target"):
                values[name] = tuple(one[part] for one, part in zip(values[name], parts, strict=True))
            elif column.per == "span":
                values[name] = tuple(map(inside, values[name], parts))
        return Example(documents, values)


def inside(spans: list[dict[str, Any]], part: slice) -> list[dict[str, Any]]:
    """Return the spans that lie in a part of a document, counted from where the part begins."""
    there = (span for span in spans if part.start <= span["at"] < part.stop)
    return [span | {"at": span["at"] - part.start} for span in there]


def collate(rows: list[list[Example]], multiple: int = 1, *, pad_id: int = 0, columns: Columns | None = None) -> Batch:
    """Return the batch of some rows of examples, whose documents do not depend on each other (see `lay`)."""
    batch = lay([[document for example in row for document in example.documents] for row in rows], pad_id, multiple)
    return with_columns(batch, [example for row in rows for example in row], columns or {})


def lay(rows: list[list[Document]], pad_id: int, multiple: int = 1) -> Batch:
    """Lay rows of documents side by side.

    The padding behind a row is a document of its own, so that `seqlens` covers every position and
    no attention mask is needed. Positions and lengths are derived here, once.

    Args:
        rows: of documents.
        pad_id: what fills rows up.
        multiple: of what the width is one.

    Returns:
        A batch whose weight is the number of its supervised tokens.
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
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        seqlens=torch.tensor(seqlens, dtype=torch.int32),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        bounds=cu_seqlens.tolist(),
        max_seqlen=max(seqlens),
        max_token=int(input_ids.max()),
        ends=torch.tensor(ends, dtype=torch.int64),
        supervised=torch.from_numpy(predicted - 1),
        targets=torch.from_numpy(flat[predicted]),
        streaks=streaks(predicted),
        depths=positions.reshape(-1)[predicted - 1],
        weight=len(predicted),
        supervised_tokens=len(predicted),
        tokens=sum(row_lengths),
        row_lengths=torch.tensor(row_lengths),
    )


def with_columns(batch: Batch, examples: list[Example], columns: Columns) -> Batch:
    """Return a batch with the values that its examples carry.

    Args:
        batch: of the documents of these examples, as `lay` laid them.
        examples: in the order in which they were laid.
        columns: what they carry.
    """
    if not columns:
        return batch
    found = {name: Extra(values_of(batch, examples, name, column), column.per) for name, column in columns.items()}
    arguments = {name: extra for name, extra in found.items() if columns[name].argument}
    extra = {name: extra for name, extra in found.items() if not columns[name].argument}
    return attrs.evolve(batch, arguments={**batch.arguments, **arguments}, extra={**batch.extra, **extra})


def values_of(batch: Batch, examples: list[Example], name: str, column: Column) -> Any:
    """Return a column's values in the layout of a batch, as `Column.per` says."""
    import numpy as np
    import torch

    values = [example.values[name] for example in examples]
    if column.per == "span":
        return [spans for value in values for spans in value]
    if column.dtype == "json":
        return values
    if column.per == "example":
        return torch.from_numpy(np.array(values, dtype=column.dtype).reshape(-1, *column.shape))
    each = [one for value in values for one in value]  # of every document
    if column.per == "document":
        return torch.from_numpy(np.array(each, dtype=column.dtype).reshape(-1, *column.shape))
    places = [np.arange(end + 1 - len(one), end + 1) for one, end in zip(each, batch.ends.tolist(), strict=True)]
    laid = np.zeros((batch.input_ids.numel(), *column.shape), dtype=column.dtype)
    laid[np.concatenate(places)] = np.concatenate(each)
    if column.per == "target":
        return torch.from_numpy(laid[batch.supervised.numpy() + 1])
    return torch.from_numpy(laid.reshape(*batch.input_ids.shape, *column.shape))


def streaks(indices: "np.ndarray") -> "np.ndarray":
    """Return how many consecutive numbers begin with each of some ascending ones.

    >>> import numpy as np
    >>> streaks(np.array([3, 4, 5, 9, 11, 12])).tolist()
    [3, 2, 1, 1, 2, 1]
    """
    import numpy as np

    ends = np.flatnonzero(np.diff(indices, append=-1) != 1)  # the last of each run
    return ends[np.searchsorted(ends, np.arange(len(indices)))] - np.arange(len(indices)) + 1


def collate_groups(
    rows: list[list[Example]], multiple: int = 1, *, pad_id: int = 0, packing: bool = True,
    columns: Columns | None = None,
) -> Batch:  # fmt: skip
    """Return the batch of some rows of groups: examples whose documents go on from one beginning, such as the replies
    to one prompt.

    Args:
        rows: of groups.
        multiple: of what the width is one.
        pad_id: what fills rows up.
        packing: whether a row's documents lie side by side; otherwise each has a row of its own, padded.
        columns: what examples carry.

    Returns:
        What `lay` returns, with the count `documents`, and:
        document: int64 [n], which document each supervised token belongs to.
        lengths: float32 [documents], the supervised tokens of each.
        ends_with_padding: whether the last token of any document is the padding token.
        branch: with packing, the layout in which the beginning of a group is there only once (see `branched`).
    """
    import numpy as np
    import torch

    groups = [example for row in rows for example in row]
    laid = [[document for example in row for document in example.documents] for row in rows]
    batch = lay(laid if packing else [[document] for row in laid for document in row], pad_id, multiple)
    counts = np.array([int(mask[1:].sum()) for row in laid for _, mask in row])
    batch = attrs.evolve(
        batch,
        counted={"documents": len(counts)},
        extra={
            "document": Extra(torch.from_numpy(np.repeat(np.arange(len(counts)), counts)), "target"),
            "lengths": Extra(torch.from_numpy(counts.astype(np.float32)), "document"),
            "ends_with_padding": Extra(bool((batch.input_ids.view(-1)[batch.ends] == pad_id).any())),
        },
    )
    batch = with_columns(batch, groups, columns or {})
    if not packing:
        return batch
    sizes = [len(ids) for row in laid for ids, _ in row]
    ids = told_apart(batch, groups, columns or {})
    return attrs.evolve(batch, branch=branched(batch, sizes, [len(group.documents) for group in groups], ids))


def told_apart(batch: Batch, examples: list[Example], columns: Columns) -> "np.ndarray":
    """Return the tokens of a batch, [rows * width], with those of different spans different: the placeholders of two
    images are the same tokens, and their `hash` is not."""
    ids: np.ndarray = batch.input_ids.numpy().reshape(-1)
    names = [name for name, column in columns.items() if column.per == "span"]
    if not names:
        return ids
    ids, known = ids.copy(), dict[str, int]()
    sizes = [len(one) for example in examples for one, _ in example.documents]
    begins = (end + 1 - size for end, size in zip(batch.ends.tolist(), sizes, strict=True))
    each = [[example.values[name][n] for name in names] for example in examples for n in range(len(example.documents))]
    for begin, lists in zip(begins, each, strict=True):
        for span in (span for spans in lists for span in spans):
            at = begin + span["at"]
            ids[at : at + span["length"]] = -1 - known.setdefault(span["hash"], len(known))
    return ids


def collate_pairs(
    rows: list[list[Example]], multiple: int = 1, *, pad_id: int = 0, packing: bool = True,
    columns: Columns | None = None,
) -> Batch:  # fmt: skip
    """Return the batch of some rows of pairs: groups of two documents, the chosen side and the rejected one.

    Returns:
        What `collate_groups` returns, except that `weight` is the number of pairs (also the count `pairs`), and:
        side: int64 [n], for each supervised token 2 * pair, or 2 * pair + 1 on the rejected side.
        lengths: float32 [pairs, 2], the supervised tokens of both sides.
    """
    batch = collate_groups(rows, multiple, pad_id=pad_id, packing=packing, columns=columns)
    pairs = sum(len(row) for row in rows)
    extra = {
        **batch.extra, "side": batch.extra["document"],
        "lengths": Extra(batch["lengths"].view(-1, 2), "example"),
    }  # fmt: skip
    return attrs.evolve(batch, weight=pairs, counted={"pairs": pairs}, extra=extra)


def branched(batch: Batch, sizes: list[int], groups: list[int], ids: "np.ndarray | None" = None) -> Layout:
    """Return a layout of groups without padding, and with the tokens that a group begins with only once.

    The first document of a group is one as before. Each other goes on from where it leaves the first: its queries are
    its own tokens, its keys those of the common beginning and its own. Where a token of the beginning predicts a token
    of several documents, its one position does it for all.

    Args:
        batch: of groups, as `lay` laid them.
        sizes: tokens of each document.
        groups: documents of each group.
        ids: int64 [rows * width], what tells whether documents begin alike; their tokens by default.

    Returns:
        The layout: one row, whose `kv_index` names the token of each key.
    """
    import numpy as np
    import torch

    ids = batch.input_ids.numpy().reshape(-1) if ids is None else ids
    begins = batch.ends.numpy() - np.array(sizes) + 1
    place = np.zeros(len(ids), dtype=np.int64)  # where each token of the batch is here
    kept, keys, queries, total, after = [], [], [], 0, iter(range(len(sizes)))
    for count in groups:
        first, *others = (next(after) for _ in range(count))
        opening = ids[begins[first] : begins[first] + sizes[first]]
        for one in (first, *others):
            begin, end = begins[one], begins[one] + sizes[one]
            known = 0 if one == first else common(opening, ids[begin:end])
            own = np.arange(begin + known, end)
            place[own] = np.arange(total, total + len(own))
            place[begin : begin + known] = place[begins[first] : begins[first] + known]
            kept.append(own)
            keys.append(place[begin:end])
            queries.append(len(own))
            total += len(own)
    index = np.concatenate(kept)

    def chosen(x: Any) -> Any:
        return x.flatten(-2)[..., index].unsqueeze(-2)  # [..., rows, width] -> [..., 1, tokens]

    return Layout(
        input_ids=chosen(batch.input_ids),
        position_ids=chosen(batch.position_ids),
        kv_index=torch.from_numpy(np.concatenate(keys)),
        taken=index,
        cu_seqlens=torch.from_numpy(np.cumsum([0, *queries], dtype=np.int32)),
        cu_seqlens_k=torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)),
        bounds=np.cumsum([0, *queries]).tolist(),
        bounds_k=np.cumsum([0, *sizes]).tolist(),
        max_seqlen=max(queries),
        max_seqlen_k=max(sizes),
        supervised=torch.from_numpy(place[batch.supervised.numpy()]),
        ends=torch.from_numpy(place[batch.ends.numpy()]),
        arguments={
            name: Extra(chosen(extra.values), "token") if extra.per == "token" else extra
            for name, extra in batch.arguments.items()
        },
    )


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
