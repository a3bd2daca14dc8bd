"""What passes from data to network and loss: a batch, and the terms of a loss.

A batch is typed, so that each part of the loop that looks into it (moving, cutting, laying out, reporting) does so by
the same definition. It can also be read as a mapping, `batch["weight"]`, which finds values of a data block's own, too.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Per = Literal["token", "target", "span", "document", "example", "batch"]
"""What has one value each: a position of the rows, a supervised token, tokens that belong together (of an image), a
document, an example, or the batch."""
ABSENT: Any = None
"""The default of fields that a data block of your own need not give."""


@attrs.frozen(eq=False)
class Extra:
    """Values beside tokens and masks, and what has one of them each."""

    values: Any
    """token: [..., rows, width]; target, document, example: [n, ...]; span: a list for each document;
    batch: anything."""
    per: Per = "batch"


@attrs.frozen(kw_only=True, eq=False)
class Layout:
    """Where tokens lie, and what a network must know to keep their documents apart."""

    input_ids: "Tensor" = ABSENT
    """int64 [rows, width]."""
    position_ids: "Tensor" = ABSENT
    """int64 [..., rows, width], inside of each document; networks with several axes of positions have more of them."""
    cu_seqlens: "Tensor" = ABSENT
    """int32 [documents + 1], where each begins, counted over rows * width; padding counts as a document."""
    bounds: list[int] = attrs.field(factory=list)
    """The same as numbers, on the host."""
    max_seqlen: int = 0
    """Tokens of the longest."""
    supervised: "Tensor" = ABSENT
    """int64 [n], the flat positions (row * width + column) that predict a supervised token."""
    ends: "Tensor" = ABSENT
    """int64 [documents but padding], the flat position of each one's last token."""
    kv_index: "Tensor | None" = None
    """int64 [keys], where documents branch: the flat position of each key, query by query."""
    cu_seqlens_k: "Tensor | None" = None
    """int32 [documents + 1], where the keys of each begin, if they are not its own tokens."""
    bounds_k: list[int] = attrs.field(factory=list)
    """The same as numbers, on the host."""
    max_seqlen_k: int | None = None
    taken: "np.ndarray | None" = None
    """int64 [tokens], on the host, where documents branch: the flat position that each token has in the batch."""
    sequence_group: Any = None
    """Ranks that have other columns of the same rows; then `cu_seqlens` are those of whole rows."""
    arguments: dict[str, Extra] = attrs.field(factory=dict)
    """Further arguments of the network, by name: pixels of images, types of tokens."""


@attrs.frozen(kw_only=True, eq=False)
class Batch(Layout):
    """One micro-batch."""

    weight: float
    """What its loss is a mean over: supervised tokens, pairs. 0 if it counts nothing."""
    tokens: int = 0
    """Positions that are not padding."""
    supervised_tokens: int = 0
    counted: dict[str, float] = attrs.field(factory=dict)
    """What else terms of a loss are means over: pairs, replies."""
    labels: "Tensor" = ABSENT
    """int64 [rows, width], not shifted; -100 where nothing is supervised."""
    seqlens: "Tensor" = ABSENT
    """int32 [documents], padding included."""
    max_token: int = 0
    """The highest token, to see whether the network knows it."""
    targets: "Tensor" = ABSENT
    """int64 [n], the supervised tokens."""
    streaks: "np.ndarray" = ABSENT
    """int64 [n], on the host: how many supervised tokens in a row begin with each target."""
    depths: "np.ndarray" = ABSENT
    """int64 [n], on the host: how far inside its document each of `supervised` is."""
    row_lengths: "Tensor" = ABSENT
    """int64 [rows], how many of each row are not padding."""
    branch: Layout | None = None
    """The same documents with what several begin with only once, for networks whose attention can branch."""
    extra: dict[str, Extra] = attrs.field(factory=dict)
    """Values of the data block's own, for the loss: margins, rewards, what a teacher said, columns of the rows."""

    @classmethod
    def of(cls, given: "Batch | Mapping[str, Any]") -> "Batch":
        """Return a batch; a data block of your own may give a dict, with `weight` and what its loss needs."""
        return given if isinstance(given, Batch) else cls(weight=given["weight"]).but(**given)

    def but(self, **changes: Any) -> "Batch":
        """Return the batch with other values; names that are no fields go to `extra`."""
        fields = {name: value for name, value in changes.items() if name in FIELDS}
        more = {n: x if isinstance(x, Extra) else Extra(x) for n, x in changes.items() if n not in FIELDS}
        if more:
            fields["extra"] = {**fields.get("extra", self.extra), **more}
        return attrs.evolve(self, **fields)

    def idle(self) -> "Batch":
        """Return the batch as one that counts nothing: what a rank computes that has no rows left."""
        counted = dict.fromkeys(self.counted, 0.0)
        return attrs.evolve(self, weight=0, tokens=0, supervised_tokens=0, counted=counted)

    @property
    def counts(self) -> dict[str, float]:
        """What terms of a loss can be means over, by name."""
        own = {"weight": self.weight, "tokens": self.tokens, "supervised_tokens": self.supervised_tokens}
        return {**own, **self.counted}

    def to(self, device: "torch.device") -> "Batch":
        """Move the tensors to a device without waiting for it; numbers and arrays stay on the host."""
        if device.type == "cpu":
            return self
        return self.map(lambda x: x if x.device == device else x.pin_memory().to(device, non_blocking=True))

    def map(self, change: "Callable[[Tensor], Any]") -> "Batch":
        """Return the batch with every tensor changed."""
        import torch

        def changed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            if isinstance(value, dict):
                return {name: changed(item) for name, item in value.items()}
            if isinstance(value, Layout | Extra):
                fields = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
                return attrs.evolve(value, **{name: changed(item) for name, item in fields.items()})
            return value

        made: Batch = changed(self)
        return made

    def columns(self, place: int, size: int, group: Any) -> "Batch":
        """Return one of `size` equal parts of the rows' columns, with what is predicted from them.

        `cu_seqlens` and `max_seqlen` stay those of whole rows, which attention works on. What belongs to whole
        documents has no part, and is left out.

        Args:
            place: which one, from 0.
            size: of how many; the width is a multiple of it.
            group: the ranks that have the others.
        """
        width = self.input_ids.shape[-1]
        each = width // size
        first = place * each
        row, column = self.supervised // width, self.supervised % width
        mine = (first <= column) & (column < first + each)
        counts = int(mine.sum()) if self.weight else 0

        def cut(extra: Extra) -> Extra:
            if extra.per == "token":
                return Extra(part(extra.values), "token")
            return Extra(extra.values[mine], "target") if extra.per == "target" else extra

        def part(x: "Tensor") -> "Tensor":
            return x[..., first : first + each].contiguous()

        return Batch(
            input_ids=part(self.input_ids), labels=part(self.labels), position_ids=part(self.position_ids),
            cu_seqlens=self.cu_seqlens, bounds=self.bounds, max_seqlen=self.max_seqlen, max_token=self.max_token,
            sequence_group=group,
            supervised=(row * each + column - first)[mine], targets=self.targets[mine], weight=counts,
            supervised_tokens=counts,
            tokens=int((self.row_lengths - first).clamp(0, each).sum()) if self.tokens else 0,
            counted=self.counted if place == 0 else dict.fromkeys(self.counted, 0.0),
            arguments={name: cut(extra) for name, extra in self.arguments.items()},
            extra={name: cut(extra) for name, extra in self.extra.items()},
        )  # fmt: skip

    def documents(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """Yield the row, the tokens and the supervised tokens of each document; where only some columns of the rows are
        here, of each row."""
        ids, labels = self.input_ids.flatten().tolist(), self.labels.flatten().tolist()
        width, row, start = self.input_ids.shape[-1], 0, 0
        ends = range(width - 1, len(ids), width) if self.ends is None else sorted(self.ends.tolist())
        for end in ends:
            if end // width != row:
                row, start = end // width, end // width * width
            there = slice(start, end + 1)
            yield row, ids[there], [token for token in labels[there] if token >= 0]
            start = end + 1

    # -- as a mapping -----------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        """Return a field, a value of the data block's own, or a count.

        Raises:
            KeyError: there is none of that name; the message lists those that there are.
        """
        if name in FIELDS and getattr(self, name) is not None:
            return getattr(self, name)
        if name in self.extra:
            return self.extra[name].values
        if name in self.counted:
            return self.counted[name]
        raise KeyError(f"this batch has no {name!r}; it has {', '.join(self.keys())}")

    def __contains__(self, name: str) -> bool:
        return name in self.keys()

    def keys(self) -> list[str]:
        """Return the names of what is there, so that `{**batch}` is a dict of it."""
        fields = [name for name in FIELDS if getattr(self, name) is not None]
        return fields + [name for name in {**self.extra, **self.counted} if name not in FIELDS]

    def get(self, name: str, default: Any = None) -> Any:
        """Return what `batch[name]` would, or the default."""
        try:
            return self[name]
        except KeyError:
            return default

    def __or__(self, changes: Mapping[str, Any]) -> "Batch":
        return self.but(**changes)


FIELDS = {field.name for field in attrs.fields(Batch)}


@attrs.frozen(eq=False)
class Term:
    """A part of a loss: a sum, over things that are counted over the whole step, all micro-batches and ranks."""

    sum: "Tensor"
    """A scalar: the sum over this micro-batch."""
    count: str = "weight"
    """What the term is a mean over: a name in `Batch.counts`, such as tokens."""
    weight: float = 1.0
    """Its weight in the loss; 0 for a value that is only reported."""
