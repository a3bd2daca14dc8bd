"""What a step of a pipeline is: a pure function from rows to requests, and from a row with its replies to rows.

A row is a dict of columns. A step never sees a reply but as the answer to what it asked about that very row, so that
no row can get what another one was answered.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.schemas import Refused, conversation
from posttrain.errors import DataError
from posttrain.interfaces import SynthBlock
from posttrain.registry import key, suggest
from posttrain.synth.keys import CHAT

if TYPE_CHECKING:
    from posttrain.synth.pipeline import Pipeline

Row = dict[str, Any]
"""Columns of plain JSON data."""
Message = dict[str, Any]
PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")


@attrs.frozen
class Chat:
    """A request that a step wants answered."""

    messages: list[Message]
    model: str | None = None
    """Which one is to answer."""
    body: dict[str, Any] = attrs.field(factory=dict)
    """Everything else of the request."""
    endpoint: str = CHAT


@attrs.frozen
class Reply:
    """What became of a request: a body, or an error."""

    body: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    """`{"code", "message", ...}`, see `posttrain.synth.results`."""

    @property
    def choice(self) -> dict[str, Any]:
        """The first choice of a chat; empty if there is none."""
        found = (self.body or {}).get("choices") or [{}]
        return found[0] if isinstance(found[0], dict) else {}

    @property
    def text(self) -> str | None:
        """What the first choice says, or None."""
        content = (self.choice.get("message") or {}).get("content")
        return content if isinstance(content, str) and content.strip() else None

    @property
    def trouble(self) -> str:
        """Why there is nothing to use, in words that can be counted."""
        return f"request failed: {self.error.get('code')}" if self.error else "the reply holds no text"


@attrs.frozen
class Drop:
    """A row that goes no further."""

    row: Row
    reason: str
    """In words that are the same for all rows of the kind: the report counts them."""
    detail: str = ""
    """What differs: a matching text, a number."""


class Step:
    """Base of all steps; a step of your own overrides what it needs.

    >>> class Short(Step):
    ...     def fold(self, row, replies):
    ...         yield row if len(row["response"]) < 100 else Drop(row, "too long")
    """

    def chats(self, row: Row) -> list[Chat]:
        """Return what to ask about a row. Called more than once: the same row must give the same requests."""
        return []

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return what becomes of a row.

        Args:
            row: not to be changed.
            replies: one for each of `chats(row)`, in that order; failures included.
        """
        return [row]

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return what becomes of all rows together, after `fold`."""
        return rows

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return what is worth knowing about the rows that this step has passed on."""
        return {}

    def __or__(self, other: "Step | Pipeline") -> "Pipeline":
        """Put another step behind this one."""
        from posttrain.synth.pipeline import Pipeline

        return Pipeline([self]) | other


@attrs.frozen(kw_only=True, slots=False)
class Asking(Step):
    """Base of steps that send requests."""

    model: str | None = None
    """Which one is to answer."""
    body: dict[str, Any] = attrs.field(factory=dict)
    """Everything else of a request: `{temperature: 0.7, max_tokens: 256}`."""
    client: SynthBlock | None = None
    """Where its requests go, if not where the pipeline's go."""

    @property
    def panel(self) -> list[str | None]:
        """Whom to ask."""
        return [self.model]

    @property
    def sent(self) -> dict[str, Any]:
        """What every request holds besides model and messages."""
        return self.body


@attrs.frozen(kw_only=True, slots=False)
class PanelStep(Asking):
    """Base of steps that can ask several models the same."""

    models: list[str] = attrs.field(factory=list)
    """Several models instead of `model`."""

    @property
    def panel(self) -> list[str | None]:
        """Whom to ask."""
        return [*self.models] or [self.model]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts."""
        if self.model and self.models:
            yield "models", "means the same as `model`; keep one of them"


@attrs.frozen(kw_only=True, slots=False)
class Template:
    """One message of a template."""

    role: str = key()
    """system, user or assistant."""
    content: str = key()
    """Text; `{column}` stands for a column of the row, `{{` and `}}` for braces."""


# -- columns --------------------------------------------------------------------------


def column(row: Mapping[str, Any], name: str) -> Any:
    """Return a column of a row.

    Raises:
        DataError: it has none of that name.
    """
    if name not in row:
        raise DataError(f"there is no column {name!r}{suggest(name, row)} (columns: {', '.join(row)})")
    return row[name]


def filled(template: str, row: Mapping[str, Any]) -> str:
    """Put the columns of a row into a template.

    >>> filled("{{{a}}}: {b}", {"a": 1, "b": "x{a}"})
    '{1}: x{a}'
    """

    def value(found: re.Match[str]) -> str:
        return found[0][0] if not found[1] else as_text(column(row, found[1]))

    return PLACE.sub(value, template)


def as_text(value: Any) -> str:
    """Return a column as text: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def texts(value: Any) -> Iterator[str]:
    """Yield every text inside a column: of a conversation, the contents of its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name != "role":
                yield from texts(item)


def asked(row: Row) -> list[Message]:
    """Return the messages that a row asks: its `prompt`, or else its conversation up to the last user turn.

    Raises:
        DataError: there is nothing to ask.
    """
    said = row.get("prompt")
    if isinstance(said, str) and said.strip():
        return [{"role": "user", "content": said}]
    try:
        messages: list[Message] = conversation({"messages": said} if isinstance(said, list) else row)["messages"]
    except Refused as refused:
        raise DataError(str(refused)) from None
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError("the conversation holds no user turn")
    return messages


def answered(row: Row) -> tuple[list[Message], str]:
    """Return the messages that a row asks, and the text that answers them, in any schema that trainers read.

    Raises:
        DataError: there is no answer.
    """
    if isinstance(row.get("prompt"), str | list) and isinstance(row.get("response"), str):
        return asked(row), row["response"]
    try:
        messages: list[Message] = conversation(row)["messages"]
    except Refused as refused:
        raise DataError(str(refused)) from None
    if messages[-1]["role"] != "assistant" or not isinstance(messages[-1].get("content"), str):
        raise DataError("the conversation does not end with a text of the assistant")
    return messages[:-1], messages[-1]["content"]


def transcript(messages: list[Message]) -> str:
    """Return a conversation as text for a judge; one user turn is its text alone."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return as_text(messages[0].get("content", ""))
    return "\n\n".join(f"[{m['role']}]\n{as_text(m.get('content', ''))}" for m in messages)
