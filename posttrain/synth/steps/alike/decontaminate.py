"""Decontaminate: drop rows that share a long run of words with data that a model is to be tested on.

The rule is that of GPT-3 (arXiv:2005.14165, appendix C): 13 words in a row, whatever the case and the punctuation. In
scripts without blanks between words, a character counts as one.
"""

from collections.abc import Iterable, Iterator

import attrs
from attrs.validators import gt, min_len

from posttrain.blocks.data.sources import Source
from posttrain.registry import block, key
from posttrain.synth.pipelines.rows import Drop, Row, texts
from posttrain.synth.pipelines.step import Step
from posttrain.synth.steps.alike.dedup import words


@block("step", "decontaminate")
class Decontaminate(Step):
    """Drop rows that overlap with test data; the reason names where, and the words that match."""

    against: list[Source] = key(check=min_len(1))
    """The test data."""
    ngram: int = key(13, check=gt(0))
    """Words in a row that make an overlap."""
    shortest: int = key(8, check=gt(0))
    """A text of the test data with fewer than `ngram` words is looked for whole, from so many words on."""
    columns: list[str] = attrs.field(factory=list)
    """Columns of the rows to look at; all unless given."""

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return the rows that overlap with nothing."""
        index = Index(self.ngram, self.shortest)
        for source in self.against:
            for test, _ in source.read(source.open()):
                index.add(texts(test.values), test.place)
        for row in rows:
            read = (row.get(name) for name in self.columns) if self.columns else row.values()
            found = next((match for value in read for text in texts(value) if (match := index.find(text))), None)
            yield row if found is None else Drop(row, "overlaps with test data", f"{found[1]}: {found[0]}")


class Index:
    """Every run of words in the test data, and where it is from."""

    def __init__(self, ngram: int, shortest: int) -> None:
        self.ngram, self.shortest = ngram, shortest
        self.places: dict[int, dict[str, str]] = {}
        """Words of a run -> the run -> place of the first row that has it."""

    def add(self, found: Iterable[str], place: str) -> None:
        """Take in the texts of a row."""
        for text in found:
            known = words(text)
            size = min(self.ngram, len(known))
            if size >= min(self.shortest, self.ngram):
                runs = self.places.setdefault(size, {})
                for run in _runs(known, size):
                    runs.setdefault(run, place)

    def find(self, text: str) -> tuple[str, str] | None:
        """Return the longest matching span of a text, and the place of what it matches; None if nothing does."""
        said, best = words(text), (0, 0, "")
        for size, runs in self.places.items():
            begin = None
            for start, run in enumerate([*_runs(said, size), None]):
                hit = run is not None and run in runs
                if hit and begin is None:
                    begin = start
                if not hit and begin is not None:
                    length = start - begin + size - 1
                    if length > best[0]:
                        best = (length, begin, runs[" ".join(said[begin : begin + size])])
                    begin = None
        length, begin, place = best
        return (" ".join(said[begin : begin + length]), place) if length else None


def _runs(found: list[str], size: int) -> Iterator[str]:
    return (" ".join(found[start : start + size]) for start in range(len(found) - size + 1))
