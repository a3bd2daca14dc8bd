"""Small steps over rows: keep some, split an answer into several rows, put examples beside a row."""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
from attrs.validators import gt

from posttrain.errors import DataError
from posttrain.registry import block, key
from posttrain.synth.ledger.replies import parsed
from posttrain.synth.pipelines.rows import Drop, Row, as_text, column
from posttrain.synth.pipelines.step import Step


@block("step", "filter")
class Filter(Step):
    """Keep the rows whose column is as wanted."""

    column: str = "score"
    """What to look at."""
    least: float | None = None
    """Keep from here on."""
    most: float | None = None
    """Keep up to here."""
    equals: str | int | float | bool | None = None
    """Keep this value, such as `stop` of `finish_reason`."""
    function: Callable[[Row], bool] | None = None
    """From Python: keep the rows of which it is true."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what says nothing."""
        if all(given is None for given in (self.least, self.most, self.equals, self.function)):
            yield "least", "nothing is filtered: give least, most or equals"

    def fold(self, row: Row, replies: list[Any]) -> Iterable[Row | Drop]:
        """Return the row, or drop it with the reason."""
        if self.function is not None:
            return [row if self.function(row) else Drop(row, "refused by the function")]
        value = column(row, self.column)
        if self.equals is not None and value != self.equals:
            return [Drop(row, f"{self.column} is not {self.equals}", as_text(value))]
        if self.least is None and self.most is None:
            return [row]
        if value is None:
            return [Drop(row, f"there is no {self.column}")]
        if not isinstance(value, int | float):
            kind = "text" if isinstance(value, str) else type(value).__name__
            raise DataError(
                f"column {self.column!r} holds {kind}, and `least` and `most` compare numbers; use `equals`"
            )
        if value != value:
            return [Drop(row, f"{self.column} is not a number (NaN)")]
        if self.least is not None and value < self.least:
            return [Drop(row, f"{self.column} is below {self.least:g}", as_text(value))]
        if self.most is not None and value > self.most:
            return [Drop(row, f"{self.column} is above {self.most:g}", as_text(value))]
        return [row]


@block("step", "split")
class Split(Step):
    """Make a row of each item of a list that a model wrote: a JSON list, or lines that are numbered or marked."""

    column: str = "response"
    """Where the list is."""
    into: str = "prompt"
    """Column of the item."""

    def fold(self, row: Row, replies: list[Any]) -> Iterable[Row | Drop]:
        """Return a row for each item, without what belonged to the list."""
        found = items(as_text(column(row, self.column)))
        kept = {k: v for k, v in row.items() if k not in (self.column, "prompt", "model", "finish_reason", "reasoning")}
        return [{**kept, self.into: item} for item in found] or [Drop(row, "holds no list")]


@block("step", "rename")
class Rename(Step):
    """Give columns other names, and leave columns out: what one step has answered is what the next one asks."""

    columns: dict[str, str] = attrs.field(factory=dict)
    """Column -> its new name; one that has this name already is replaced: `{response: prompt}`."""
    drop: list[str] = attrs.field(factory=list)
    """Columns to leave out; those that a row lacks are no matter."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what would lose a column."""
        named = list(self.columns.values())
        for name in sorted({name for name in named if named.count(name) > 1}):
            yield "columns", f"two columns would be {name!r}"

    def fold(self, row: Row, replies: list[Any]) -> Iterable[Row | Drop]:
        """Return the row with its new names."""
        moved = {new: column(row, old) for old, new in self.columns.items()}
        gone = {*self.columns, *self.drop, *moved}
        return [{**{name: value for name, value in row.items() if name not in gone}, **moved}]


@block("step", "few-shot")
class FewShot(Step):
    """Make rows that hold some of the rows as examples.

    They are text in the column `examples`; self-instruct (arXiv:2212.10560) asks for more of the kind. Which ones is a
    function of `seed` and the rows alone.
    """

    column: str = "prompt"
    """What of the rows to show."""
    k: int = key(3, check=gt(0))
    """How many to show."""
    rows: int | None = None
    """Rows to make; as many as came in unless given."""
    seed: int = 42
    """Another one shows other rows."""

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return rows with examples; the rows themselves do not go on."""
        pool = list(dict.fromkeys(as_text(column(row, self.column)) for row in rows))
        for number in range(self.rows if self.rows is not None else len(pool)):
            digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
            shown = random.Random(digest).sample(pool, min(self.k, len(pool)))
            yield {"examples": "\n".join(f"{i}. {text}" for i, text in enumerate(shown, 1)), "draw": number}


def items(text: str) -> list[str]:
    """Return the items of a list that a model wrote.

    >>> items('1. Sing.\\n2) Dance\\n  with me.\\n'), items('["a", "b"]')
    (['Sing.', 'Dance with me.'], ['a', 'b'])
    """
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, flags=re.DOTALL)
    if (whole := _listed(fenced[1] if fenced else text)) is not None:
        return whole
    made: list[str] = []
    for line in text.splitlines():
        begun = re.match(r"\s*(?:\d+[.):]|[-*•])\s+(.*)", line)
        if begun:
            made.append(begun[1].strip())
        elif made and line.strip():
            made[-1] += " " + line.strip()
    if not any(made):  # a list of JSON inside prose, which `[1]` and `[note]` are not
        for start in (found.start() for found in re.finditer(r"\[", text)):
            if (inside := _listed(text[start : text.rfind("]") + 1])) is not None:
                return inside
    return [item for item in made if item]


def _listed(text: str) -> list[str] | None:
    """Return the items of a JSON list of texts or objects; None if a text is no such list."""
    listed = parsed(text.encode("utf-8", "surrogatepass"))
    if not isinstance(listed, list) or all(isinstance(item, int | float) for item in listed):
        return None
    return [as_text(item).strip() for item in listed if as_text(item).strip()]
