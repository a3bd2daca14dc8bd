"""Reads several sources as one stream of rows that can be taken up again after any row.

Which source comes next is a pure function of (seed, epoch, count of choices), so the state is small and plain:
that count, which sources are used up, and where each one stands.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from posttrain.blocks.data.encoding.encoders import Encoder, apart
from posttrain.blocks.data.readers import Row
from posttrain.blocks.data.rows.schemas import Refused
from posttrain.blocks.data.sources import Source
from posttrain.blocks.data.store import note
from posttrain.blocks.data.views import Limits, images_of, pieces
from posttrain.blocks.layout import Example
from posttrain.errors import DataError
from posttrain.words import counted


@attrs.frozen
class Stream:
    """Weighted sources, interleaved.

    Sizes of streams are unknown, so each choice falls on a source with a probability in proportion to its weight
    among those that are not used up. A weight of 2.5 reads a source twice and a random half of it a third time.
    """

    sources: Sequence[Source]
    seed: int

    def read(self, epoch: int, state: dict[str, Any] | None) -> Iterator[tuple[Row, int, dict[str, Any]]]:
        """Yield the rows of one pass: (row, index of its source, JSON-able state after it).

        Args:
            epoch: number of the pass, from 0.
            state: what came with the last row that was used; None for the beginning.
        """
        every = list(range(len(self.sources)))
        state = state or {"choices": 0, "open": every, "sources": [{"pass": 0, "state": None} for _ in every]}
        choices, places = state["choices"], [dict(place) for place in state["sources"]]
        readers = [self._passes(number, epoch, places[number]) for number in every]
        open_ = list(state["open"])
        yielded = False
        while open_:
            number = self._choose(open_, epoch, choices)
            choices += 1
            found = next(readers[number], None)
            if found is None:
                open_.remove(number)
                if self.sources[number].share is not None:  # without it, the shares would not hold
                    return
                continue
            row, places[number] = found
            yielded = True
            yield row, number, {"choices": choices, "open": list(open_), "sources": list(places)}
        if not yielded and state["choices"] == 0:
            raise DataError(f"no rows in {', '.join(source.label for source in self.sources)}")

    def _choose(self, open_: list[int], epoch: int, choices: int) -> int:
        if len(open_) == 1:
            return open_[0]
        weights = {n: self.sources[n].share or self.sources[n].weight for n in open_}
        point = uniform(self.seed, epoch, choices) * sum(weights.values())
        for number in open_:
            point -= weights[number]
            if point < 0:
                return number
        return open_[-1]

    def _passes(self, number: int, epoch: int, place: dict[str, Any]) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Yield the rows of one source, as often as its weight says, each with the place after it."""
        source = self.sources[number]
        state = place["state"]
        for turn in range(place["pass"], int(-(-source.weight // 1))):
            share = min(1.0, source.weight - turn)
            for row, after in source.read(source.open(), state):
                if share == 1.0 or uniform(self.seed, epoch, number, row.number) < share:
                    yield row, {"pass": turn, "state": after}
            state = None


@attrs.frozen
class StreamEncoding:
    """Encodes the rows of a stream."""

    encoder: Encoder
    limits: Limits
    labels: list[str]

    def encode(self, rows: list[tuple[Row, int]], ledger: dict[str, Any]) -> list[Example]:
        """Return the examples of some rows, cut or left out as the policies say; the ledger counts them, per source."""
        found: list[Example] = []
        for (row, number), encoded in zip(rows, self.encoder.encode([row.values for row, _ in rows]), strict=True):
            entry = self._entry(ledger, number)
            left: list[Example] = []
            if isinstance(encoded, Refused):
                if self.limits.invalid == "error":
                    raise DataError(f"{row.place}: {encoded}; fix it, or leave such rows out with data.invalid=drop")
                note(entry["dropped"], str(encoded), f"{row.place}: {encoded.detail}" if encoded.detail else row.place)
            else:
                for one in apart(encoded, self.encoder.sides, self.encoder.columns):
                    left += self._cut(one, row, entry)
            self._count(entry, left)
            found += left
        return found

    def _cut(self, example: Example, row: Row, entry: dict[str, Any]) -> list[Example]:
        longest = max(len(ids) for ids, _ in example.documents)
        entry["tokens_in"] += len(example)
        entry["longest"] = max(entry["longest"], longest)
        if longest <= self.limits.max_length:
            return [example]
        if self.limits.overflow == "error":
            raise DataError(
                f"{row.place} has {counted(longest, 'token')}, data.max_length is {self.limits.max_length:,}: "
                f"{self.limits.advice}"
            )
        entry["too_long"] += 1
        if self.limits.overflow == "drop":
            note(entry["dropped"], self.limits.too_long, row.place)
            entry["tokens_cut"] += len(example)
            return []
        left = []
        for piece in pieces(example, self.limits, self.encoder.sides, self.encoder.columns):
            if piece.useless:
                note(entry["dropped"], piece.useless, row.place)
            else:
                left.append(example.cut(piece.parts, self.encoder.columns))
        entry["tokens_cut"] += len(example) - sum(map(len, left))
        return left

    def _entry(self, ledger: dict[str, Any], number: int) -> dict[str, Any]:
        made = "documents" if len(self.encoder.sides) == 1 else "pairs"
        counts = ("rows_in", "tokens_in", "too_long", "longest", "tokens_cut", made, "tokens", "supervised_tokens")
        entry: dict[str, Any] = ledger.setdefault(self.labels[number], {"dropped": {}})
        for name in counts:
            entry.setdefault(name, 0)
        return entry

    def _count(self, entry: dict[str, Any], examples: list[Example]) -> None:
        documents = [document for example in examples for document in example.documents]
        entry |= self.encoder.reading.summary()
        entry["rows_in"] += 1
        entry["documents" if len(self.encoder.sides) == 1 else "pairs"] += len(examples)
        entry["tokens"] += sum(len(ids) for ids, _ in documents)
        entry["supervised_tokens"] += sum(int(mask[1:].sum()) for _, mask in documents)
        for name in (name for name, column in self.encoder.columns.items() if column.per == "span"):
            for spans in (spans for example in examples for spans in example.values[name]):
                for count, value in images_of(spans).items():
                    entry[count] = entry.get(count, 0) + value


def uniform(*numbers: int) -> float:
    """Return a number in [0, 1) that looks random and depends on nothing but its arguments (splitmix64)."""
    value = 0
    for number in numbers:
        value = mix(value ^ (number & (1 << 64) - 1))
    return (value >> 11) / (1 << 53)


def mix(value: int) -> int:
    """Return the next state of splitmix64 (Steele, Lea and Flood 2014)."""
    value = value + 0x9E3779B97F4A7C15 & (1 << 64) - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return value ^ value >> 31
