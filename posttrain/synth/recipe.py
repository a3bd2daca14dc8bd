"""A recipe of `posttrain synth`: rows of a source, a template, a client -> a task and its output."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
from attrs.validators import gt, min_len

from posttrain import recipe
from posttrain.blocks.readers import Row
from posttrain.blocks.sources import Source
from posttrain.errors import DataError
from posttrain.interfaces import SynthBlock
from posttrain.registry import key, suggest
from posttrain.structure import structure_as
from posttrain.synth.client import Synth

PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")


@attrs.frozen(kw_only=True, slots=False)
class Message:
    """One message of the template."""

    role: str
    """system, user or assistant."""
    content: str
    """Text; `{column}` stands for a column of the row, `{{` and `}}` for braces."""


@attrs.frozen(kw_only=True, slots=False)
class SynthRecipe:
    """What `posttrain synth run` makes."""

    task: str = key("task", check=min_len(1))
    """Name of the task in the ledger."""
    client: SynthBlock
    """Where requests go: `{type: openai, base_url: ..., work_dir: runs/hello}`, azure, vllm or cortex."""
    source: Source
    """Rows; each becomes one request."""
    messages: list[Message] = key(factory=list, check=min_len(1))
    """Template of the conversation."""
    model: str | None = None
    """Which one is to answer."""
    body: dict[str, Any] = attrs.field(factory=dict)
    """Everything else of a request: `{temperature: 0.7, max_tokens: 256}`."""
    samples: int = key(1, check=gt(0))
    """Requests per row."""
    keep: list[str] = attrs.field(factory=list)
    """Columns to find beside the result."""
    output: Path | None = None
    """A .jsonl or .parquet file to write when the task is done; trainers read it as a source."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be honoured."""
        if self.output is not None and self.output.suffix not in (".jsonl", ".parquet"):
            yield "output", f"must end in .jsonl or .parquet, got {self.output}"
        if not isinstance(self.client, Synth):
            yield "client", f"{type(self.client).__name__} is no client of posttrain.synth"

    @property
    def synth(self) -> Synth:
        """The client."""
        assert isinstance(self.client, Synth)
        return self.client

    def add(self) -> int:
        """Add all rows to the task and return how many requests that makes.

        Raises:
            DataError: a row lacks a column that the template or `keep` names.
        """
        count = 0
        for row, _ in self.source.read(self.source.open()):
            messages = [{"role": m.role, "content": filled(m.content, row)} for m in self.messages]
            kept = {name: column(row, name) for name in self.keep}
            for _ in range(self.samples):
                self.synth.add_chat_to_batch_task(self.task, messages, model=self.model, keep=kept, **self.body)
                count += 1
        if not count:
            raise DataError(f"{self.source.label} has no rows")
        return count

    def export(self, path: Path) -> int:
        """Write the conversations of the task; return how many."""
        write = self.synth.to_parquet if path.suffix == ".parquet" else self.synth.to_jsonl
        return write(self.task, path)


def load(path: Path, overrides: list[str]) -> SynthRecipe:
    """Return the recipe in a file, or say everything that is wrong with it.

    Raises:
        RecipeError: with a line for each problem.
    """
    begins = "`client: {type: openai, ...}`, then `source:`, `messages:` and what differs"
    return recipe.load_as(lambda data: structure_as(data, SynthRecipe), path, overrides, begins)


def column(row: Row, name: str) -> Any:
    """Return a column of a row.

    Raises:
        DataError: it has none of that name.
    """
    if name not in row.values:
        known = ", ".join(row.values)
        raise DataError(f"{row.place}: there is no column {name!r}{suggest(name, row.values)} (columns: {known})")
    return row.values[name]


def filled(template: str, row: Row) -> str:
    """Put the columns of a row into a template.

    >>> filled("{{{a}}}: {b}", Row({"a": 1, "b": "x{a}"}, 0, "here"))
    '{1}: x{a}'
    """

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        content = column(row, found[1])
        return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)

    return PLACE.sub(value, template)
