"""Which documents share a row: best-fit packing, as a plan of indices over documents that stay where they are."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

WINDOW = 10_000
"""Documents packed together. Rows are filled to more than 99.9 % from a few thousand documents on, and
a window bounds how far a document moves from its place in the random order."""


def best_fit(lengths: "np.ndarray", capacity: int) -> list[list[int]]:
    """Pack items into as few bins as best-fit-decreasing finds.

    The longest item goes first, each into the fullest bin that still holds it. Bins are kept by
    their free space, and one big integer has a bit set for every space that some bin has, so the
    tightest fit is the lowest set bit from the item's length on: constant work per item.

    Args:
        lengths: [n] positive integers, none above `capacity`.
        capacity: of a bin.

    Returns:
        The indices in each bin, the bin's longest item first.

    >>> import numpy as np
    >>> best_fit(np.array([3, 7, 5, 2, 3]), 10)
    [[1, 0], [2, 4, 3]]
    """
    import numpy as np

    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
            bins[chosen].append(item)
        else:
            space, chosen = capacity, len(bins)
            bins.append([item])
        left = space - length
        if left:
            if not with_space[left]:
                spaces |= 1 << left
            with_space[left].append(chosen)
    return bins


def plan(order: "np.ndarray", lengths: "np.ndarray", capacity: int) -> list[list[int]]:
    """Pack documents in the given order, window by window.

    Args:
        order: [n] indices of documents.
        lengths: [documents] their lengths.
        capacity: of a row, in tokens.

    Returns:
        The indices of the documents of each row.
    """
    rows: list[list[int]] = []
    for begin in range(0, len(order), WINDOW):
        window = order[begin : begin + WINDOW]
        names = window.tolist()
        rows += [[names[i] for i in found] for found in best_fit(lengths[window], capacity)]
    return rows


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while found := list(itertools.islice(iterator, size)):
        yield found
