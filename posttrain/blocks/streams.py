"""Several sources as one stream of rows, with a state from which reading can go on."""

import random
from collections.abc import Iterator
from typing import Any

import attrs

from posttrain.blocks.readers import Row
from posttrain.blocks.sources import Source


@attrs.frozen
class Stream:
    """Rows of weighted sources, interleaved by chance; which source comes next is a function of (seed, epoch, count).

    A weight is relative here: a source of weight 2 is drawn from twice as often, until it is exhausted.
    """

    sources: list[Source]
    seed: int

    def read(self, epoch: int, state: dict[str, Any] | None) -> Iterator[tuple[Row, int, dict[str, Any]]]:
        """Yield one pass: each row with the number of its source, and the JSON-able state after it."""
        states: list[Any] = list(state["sources"]) if state else [None] * len(self.sources)
        open_: list[int] = list(state["open"]) if state else list(range(len(self.sources)))
        count = state["count"] if state else 0
        readers = {n: self.sources[n].read(self.sources[n].open(), states[n]) for n in open_}
        while open_:
            number = self._draw(open_, epoch, count)
            count += 1
            try:
                row, states[number] = next(readers[number])
            except StopIteration:
                open_.remove(number)
                continue
            yield row, number, {"sources": list(states), "open": list(open_), "count": count}

    def _draw(self, open_: list[int], epoch: int, count: int) -> int:
        if len(open_) == 1:
            return open_[0]
        chance = random.Random(f"{self.seed},{epoch},{count}")
        return chance.choices(open_, [self.sources[n].weight for n in open_])[0]
