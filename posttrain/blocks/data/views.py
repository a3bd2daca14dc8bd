"""What of the tokenized rows is trained on: views, after rows were held out, dropped and cut; and the ledger."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.data.store import Table
from posttrain.blocks.layout import Columns, Example
from posttrain.errors import DataError
from posttrain.words import counted

if TYPE_CHECKING:
    import numpy as np


IMAGE_COUNTS = ("images", "image_tokens", "images_shrunk")
"""What a ledger says of images."""


@attrs.frozen(eq=False)
class Documents:
    """Views of the tokenized rows of several sources: what is trained on, after rows were dropped and cut."""

    tables: list[Table]
    begins: "np.ndarray"
    """int64 [n, sides], where each document of an example begins in its table."""
    sizes: "np.ndarray"
    """int32 [n, sides], their tokens."""
    supervised: "np.ndarray"
    """int32 [n, sides], their supervised tokens."""
    source: "np.ndarray"
    """int16 [n], the number of an example's table."""
    example: "np.ndarray"
    """int64 [n], which example of that table it is, or is a part of."""
    weights: list[float]
    """Of each source."""

    def __len__(self) -> int:
        return len(self.begins)

    @property
    def lengths(self) -> "np.ndarray":
        """int32 [n], the tokens of each example."""
        lengths: np.ndarray = self.sizes.sum(1)
        return lengths

    def __getitem__(self, index: int) -> Example:
        """Return an example, without copying its tokens."""
        ends = self.begins[index] + self.sizes[index]
        return self.tables[int(self.source[index])].view(int(self.example[index]), self.begins[index], ends)


@attrs.frozen
class Limits:
    """What happens to rows that are too long or unusable."""

    max_length: int
    overflow: str
    invalid: str
    policies: tuple[str, ...] = ("drop", "truncate", "split")
    """Values of `overflow` that avoid an error."""

    @property
    def advice(self) -> str:
        """What to do about rows that are too long."""
        *most, last = self.policies
        choices = f"{', '.join(most)} or {last}" if most else last
        return f"raise data.max_length, or set data.overflow to {choices}"

    @property
    def too_long(self) -> str:
        """The reason that the ledger counts."""
        return f"longer than {self.max_length:,} tokens"


def documents(
    tables: list[Table], weights: list[float], limits: Limits, held_out: float, want_held_out: bool
) -> tuple[Documents, dict[str, dict[str, Any]]]:
    """Return views of the tables, and the ledger of what became of their rows, per source.

    Args:
        tables: one per source.
        weights: one per source.
        limits: the policies.
        held_out: share of the rows that belong to evaluation.
        want_held_out: whether to return these or the others.

    Raises:
        DataError: rows are unusable or too long, and the policy is `error`.
    """
    import numpy as np

    refuse_invalid(tables, limits)
    parts, ledger = [], dict[str, dict[str, Any]]()
    for number, from_table in enumerate(tables):
        chosen = np.flatnonzero(is_held_out(from_table.rows, held_out) == want_held_out)
        begins, sizes, supervised, examples, counts = cut(from_table, chosen, limits)
        name = from_table.label if from_table.label not in ledger else f"{from_table.label} #{number + 1}"
        refused = {reason: found["count"] for reason, found in from_table.refused.items()} if not want_held_out else {}
        ledger[name] = {
            **from_table.reading,
            "rows_in": len(np.unique(from_table.rows[chosen])) + sum(refused.values()),  # a row may give several
            "tokens_in": int(np.diff(from_table.offsets).reshape(-1, len(from_table.sides))[chosen].sum()),
            "dropped": refused | counts.pop("dropped"),
            **counts,
            "documents" if len(from_table.sides) == 1 else "pairs": len(begins),
            "tokens": int(sizes.sum()),
            "supervised_tokens": int(supervised.sum()),
            **images_in(from_table, begins, sizes, examples),
        }
        source = np.full(len(begins), number, dtype=np.int16)
        parts.append((begins, sizes.astype(np.int32), supervised, source, examples))
    refuse_overlong(ledger, limits)
    begins, sizes, supervised, source, example = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not len(begins):
        lines = (f"  {name}: {found}" for name, found in ledger.items())
        raise DataError("nothing is left to train on:\n" + "\n".join(lines))
    return Documents(tables, begins, sizes, supervised, source, example, weights), ledger


def images_in(table: Table, begins: "np.ndarray", sizes: "np.ndarray", examples: "np.ndarray") -> dict[str, int]:
    """Return how many images some views of a table hold, their tokens, and how many of them the model sees smaller than
    they are; nothing for a model that sees none.

    Args:
        table: of the views.
        begins, sizes: int64 [n, sides], of their documents.
        examples: int64 [n], of the table.
    """
    import numpy as np

    found: Counter[str] = Counter()
    names = [name for name, column in table.columns.items() if column.per == "span"]
    for name in names:
        there = np.unique(table.values[name].filled // len(table.sides))
        for n in np.flatnonzero(np.isin(examples, there)).tolist():
            for spans in table.view(int(examples[n]), begins[n], begins[n] + sizes[n]).values[name]:
                found.update(images_of(spans))
    return {name: found[name] for name in IMAGE_COUNTS} if names else {}


def images_of(spans: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return how many images these are, their tokens, and how many are seen smaller than they are."""
    counts = [(1, span["tokens"], int(span["shrunk"])) for span in spans]
    return dict(zip(IMAGE_COUNTS, map(sum, zip(*counts, strict=True)), strict=True)) if counts else {}


def by_share(found: Documents, shares: list[float]) -> Documents:
    """Return the same views with weights by which a pass holds shares of examples; none of them comes twice."""
    import numpy as np

    counts = np.bincount(found.source, minlength=len(shares))
    rates = np.divide(shares, counts, out=np.zeros(len(shares)), where=counts > 0)
    return attrs.evolve(found, weights=[float(rate) for rate in rates / rates.max()])


def is_held_out(rows: "np.ndarray", share: float) -> "np.ndarray":
    """Tell which rows of a source belong to evaluation: a fixed, evenly spread choice that no seed changes."""
    import numpy as np

    return np.asarray((rows.astype(np.uint64) * np.uint64(2654435769)) % np.uint64(2**32) < share * 2**32)


def cut(
    from_table: Table, chosen: "np.ndarray", limits: Limits
) -> tuple["np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray", dict[str, Any]]:
    """Apply the overflow policy to some examples of a table.

    Returns:
        begins, sizes, supervised: [n, sides], of what is left.
        examples: [n], which example of the table it is from.
        counts: what was done.
    """
    import numpy as np

    sides = len(from_table.sides)
    begins, supervised = from_table.offsets[:-1].reshape(-1, sides)[chosen], from_table.supervised.reshape(-1, sides)
    sizes = np.diff(from_table.offsets).reshape(-1, sides)[chosen]
    supervised = supervised[chosen]
    long = (sizes > limits.max_length).any(1)
    counts: dict[str, Any] = {"dropped": {}, "too_long": int(long.sum()), "longest": int(sizes.max(initial=0))}
    if not long.any():
        return begins, sizes, supervised, chosen, counts
    found: list[tuple[int, list[int], Piece]] = []
    if limits.overflow == "drop":
        counts["dropped"][limits.too_long] = counts["too_long"]
    elif limits.overflow in ("truncate", "split"):
        for example, firsts in zip(chosen[long].tolist(), begins[long].tolist(), strict=True):
            left = pieces(from_table[example], limits, from_table.sides, from_table.columns)
            found += [(example, firsts, piece) for piece in left]
    counts["dropped"] |= Counter(piece.useless for _, _, piece in found if piece.useless)
    useful = [(example, firsts, piece) for example, firsts, piece in found if not piece.useless]
    counts["tokens_cut"] = int(sizes[long].sum()) - sum(sum(piece.sizes) for _, _, piece in useful)
    columns = [
        [[first + part.start for first, part in zip(firsts, p.parts, strict=True)] for _, firsts, p in useful],
        [p.sizes for _, _, p in useful],
        [p.supervised for _, _, p in useful],
    ]
    more = [np.array(column, dtype=np.int64).reshape(-1, sides) for column in columns]
    more.append(np.array([example for example, _, _ in useful], dtype=np.int64))
    kept = (begins[~long], sizes[~long], supervised[~long], chosen[~long])
    return *(np.concatenate(both) for both in zip(kept, more, strict=True)), counts  # type: ignore[return-value]


@attrs.frozen
class Piece:
    """What the overflow policy leaves of an example, or a part of it."""

    parts: list[slice]
    """Of each document."""
    supervised: list[int]
    """Supervised tokens of each part."""
    useless: str | None
    """Why nothing can be learned from it, if so."""

    @property
    def sizes(self) -> list[int]:
        """Tokens of each part."""
        return [part.stop - part.start for part in self.parts]


def pieces(example: Example, limits: Limits, sides: tuple[str, ...], columns: Columns) -> Iterator[Piece]:
    """Yield what is left of an example that is too long; only single documents are ever split into several pieces.

    What belongs together, as the tokens of an image do, is never cut: a piece ends before it.
    """
    split = limits.overflow == "split"
    names = [name for name, column in columns.items() if column.per == "span"]
    each = [[span for name in names for span in example.values[name][n]] for n in range(len(example.documents))]
    cuts = [
        list(parts_of(len(ids), limits.max_length, spans, split))
        for (ids, _), spans in zip(example.documents, each, strict=True)
    ]
    for parts in zip(*cuts, strict=True):
        piece = example.cut(list(parts), columns)
        supervised = [int(mask[1:].sum()) for _, mask in piece.documents]
        useless = None
        if any(len(ids) > limits.max_length for ids, _ in piece.documents):
            useless = "cut, an image has more tokens than data.max_length"
        elif not all(supervised):
            useless = "cut, no supervised token is left"
        elif len(parts) > 1 and piece.alike(columns):
            useless = f"cut, {' and '.join(sides)} are equal"
        yield Piece(list(parts), supervised, useless)


def parts_of(length: int, longest: int, spans: list[dict[str, Any]], split: bool) -> Iterator[slice]:
    """Yield the parts of a document that are at most so long, or the first; a span that is longer is a part by itself.

    >>> list(parts_of(10, 4, [{"at": 2, "length": 3}], True))
    [slice(0, 2, None), slice(2, 6, None), slice(6, 10, None)]
    """
    begin = 0
    while begin < length:
        end = min(begin + longest, length)
        if torn := next((span for span in spans if span["at"] < end < span["at"] + span["length"]), None):
            end = torn["at"] if torn["at"] > begin else begin + torn["length"]
        yield slice(begin, end)
        if not split:
            return
        begin = end


def refuse_invalid(tables: Iterable[Table], limits: Limits) -> None:
    """Raise if rows cannot be trained on and the policy is to say so."""
    lines = [
        f"  {found['count']:,} x {reason} (such as {', '.join(found['examples'])})"
        for from_table in tables
        for reason, found in from_table.refused.items()
    ]
    if lines and limits.invalid == "error":
        raise DataError(
            "some rows cannot be trained on:\n"
            + "\n".join(lines)
            + "\nfix them, or leave them out with data.invalid=drop"
        )


def refuse_overlong(ledger: dict[str, dict[str, Any]], limits: Limits) -> None:
    """Raise if rows are too long and the policy is to say so."""
    lines = [
        f"  {name}: {found['too_long']:,} of {counted(found['rows_in'], 'row')} "
        f"{'is' if found['too_long'] == 1 else 'are'} longer than {counted(limits.max_length, 'token')} "
        f"(the longest has {found['longest']:,})"
        for name, found in ledger.items()
        if found["too_long"]
    ]
    if lines and limits.overflow == "error":
        raise DataError("some rows are too long:\n" + "\n".join(lines) + "\n" + limits.advice)


def totals(ledger: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a ledger's sums over sources."""
    sums: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for found in ledger.values():
        sums.update({name: value for name, value in found.items() if isinstance(value, int) and name != "longest"})
        dropped.update(found["dropped"])
    return {**sums, "dropped": dict(dropped)}
