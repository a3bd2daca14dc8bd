"""Sample: columns of random values beside each row, so that what is generated differs in the ways that one wants.

Personas as in arXiv:2406.20094; attributes as in AttrPrompt, arXiv:2306.15895.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import attrs
from attrs.validators import gt

from posttrain.blocks.data.sources import Source
from posttrain.errors import DataError
from posttrain.registry import block, key
from posttrain.synth.pipelines.rows import Drop, Row, as_text, column
from posttrain.synth.pipelines.step import Step


@block("step", "sample")
class Sample(Step):
    """Give rows columns of random values: `{level: [easy, hard], topic: {law: 1, medicine: 3}}`.

    What a row gets is a function of `seed`, of what the row holds, and of how many equal ones came before it: other
    rows change nothing about it.
    """

    attributes: dict[str, Any] = attrs.field(factory=dict)
    """Column -> a list of values that are equally likely, or values with their weights."""
    sources: dict[str, Source] = attrs.field(factory=dict)
    """Column -> rows of which one gives its value of that column: `{persona: personas.jsonl}`."""
    n: int = key(1, check=gt(0))
    """Rows to make of each."""
    seed: int = 42
    """Another one gives other values."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be drawn from."""
        if not self.attributes and not self.sources:
            yield "attributes", "nothing is drawn: give attributes or sources"
        for name in sorted(self.attributes.keys() & self.sources.keys()):
            yield "sources", f"{name!r} is among the attributes as well; keep one of both"
        for name, given in self.attributes.items():
            if not isinstance(given, list | dict) or not given:
                yield "attributes", f"{name}: give a list of values, or values with their weights"
            elif isinstance(given, dict):
                numbers = all(isinstance(w, int | float) and not isinstance(w, bool) and w >= 0 for w in given.values())
                if not numbers or not any(given.values()):
                    yield "attributes", f"{name}: weights are numbers from 0 on, one of them above 0"

    @cached_property
    def pools(self) -> dict[str, list[Any]]:
        """Column -> the values of its source.

        Raises:
            DataError: a source lacks the column, or has no rows.
        """
        made = {}
        for name, source in self.sources.items():
            made[name] = [column(row.values, name) for row, _ in source.read(source.open())]
            if not made[name]:
                raise DataError(f"{source.label} holds no rows to draw {name!r} from")
        return made

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return rows with values."""
        seen: Counter[bytes] = Counter()
        pools = {**self.attributes, **self.pools}
        for row in rows:
            taken = next((name for name in (*self.attributes, *self.sources) if name in row), None)
            if taken is not None:
                raise DataError(f"the row has a column {taken!r} already: draw into another one")
            content = hashlib.sha256(json.dumps(row, sort_keys=True).encode("utf-8", "surrogatepass")).digest()
            for _ in range(self.n):
                digest = hashlib.sha256(f"{self.seed} {seen[content]} ".encode() + content).digest()
                seen[content] += 1
                chance = random.Random(digest)
                yield {**row, **{name: draw(given, chance) for name, given in pools.items()}}

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return how often each value of an attribute was drawn."""
        counts: dict[str, Counter[str]] = {name: Counter() for name in self.attributes}
        for row in rows:
            for name, found in counts.items():
                found[as_text(row[name])] += 1
        return {name: ", ".join(f"{n:,} {v}" for v, n in found.most_common(8)) for name, found in counts.items()}


def draw(given: Any, chance: random.Random) -> Any:
    """Return one of the values of a list, or of an object by their weights."""
    if isinstance(given, dict):
        return chance.choices(list(given), [float(weight) for weight in given.values()])[0]
    return given[chance.randrange(len(given))]
