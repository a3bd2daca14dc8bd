"""What passes between the steps of a pipeline: rows of columns, requests, replies, and what is dropped."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from posttrain.blocks.data.rows.media import COLUMNS
from posttrain.blocks.data.rows.schemas import Refused, conversation
from posttrain.errors import DataError
from posttrain.registry import suggest
from posttrain.synth.ledger.keys import CHAT
from posttrain.synth.ledger.replies import calls_of, reasoning_of, text_of
from posttrain.synth.pipelines.images import with_images

Row = dict[str, Any]
"""Columns of plain JSON data."""
Message = dict[str, Any]


@attrs.frozen
class Chat:
    """A request that a step wants answered."""

    messages: list[Message]
    model: str | None = None
    """Which one is to answer."""
    body: dict[str, Any] = attrs.field(factory=dict)
    """Everything else of the request."""
    endpoint: str = CHAT
    to: str = ""
    """Who answers, if not the step's client: a name of the step's `others`."""
    about: Any = attrs.field(default=None, eq=False)
    """What the step wants to find again beside the reply; it is not sent."""


@attrs.frozen
class Reply:
    """What became of a request: a body, or an error."""

    body: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    """`{"code", "message", ...}`, see `posttrain.synth.ledger.results`."""
    chat: Chat | None = attrs.field(default=None, repr=False)
    """What it answers."""

    @property
    def choice(self) -> dict[str, Any]:
        """The first choice of a chat; empty if there is none."""
        found = (self.body or {}).get("choices") or [{}]
        return found[0] if isinstance(found[0], dict) else {}

    @property
    def text(self) -> str | None:
        """What the first choice says, or None."""
        return text_of(self.choice.get("message") or {})

    @property
    def reasoning(self) -> str | None:
        """What the model thought before it answered, where the server tells the two apart."""
        return reasoning_of(self.choice.get("message") or {})

    @property
    def trouble(self) -> str:
        """Why there is nothing to use, in words that can be counted."""
        if self.error:
            return f"request failed: {self.error.get('code')}"
        if self.refusal:
            return "the model refused"
        cut = self.choice.get("finish_reason") in ("content_filter", "length")
        return f"the reply holds no text: {self.choice['finish_reason']}" if cut else "the reply holds no text"

    @property
    def said(self) -> str | None:
        """What the reply says where a form was asked for: its text, or the arguments of the one tool that it calls."""
        calls = calls_of(self.choice.get("message") or {})
        if self.text is not None or len(calls) != 1:
            return self.text
        arguments = calls[0].get("arguments")
        return arguments if isinstance(arguments, str) or arguments is None else as_text(arguments)

    @property
    def refusal(self) -> str | None:
        """What the model says in place of an answer, where the provider tells the two apart."""
        said = (self.choice.get("message") or {}).get("refusal")
        return said if isinstance(said, str) and said else None


@attrs.frozen
class Drop:
    """A row that goes no further."""

    row: Row
    reason: str
    """In words that are the same for all rows of the kind: the report counts them."""
    detail: str = ""
    """What differs: a matching text, a number."""


def column(row: Mapping[str, Any], name: str) -> Any:
    """Return a column of a row.

    Raises:
        DataError: it has none of that name.
    """
    if name not in row:
        raise DataError(f"there is no column {name!r}{suggest(name, row)} (columns: {', '.join(row)})")
    return row[name]


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


def on_wire(messages: list[Message]) -> list[Message]:
    """Return messages as servers take them: the arguments of tool calls are text; templates want them as objects."""
    return [
        {**m, "tool_calls": [_call(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": as_text(function.get("arguments") or {})}}


def asked(row: Row) -> list[Message]:
    """Return the messages that a row asks: its `prompt`, or else its conversation up to the last user turn.

    Raises:
        DataError: there is nothing to ask.
    """
    said = row.get("prompt")
    images = {name: row[name] for name in COLUMNS if name in row}
    if isinstance(said, str) and said.strip():
        return with_images([{"role": "user", "content": said}], images)
    try:
        whole = {"messages": said, **images} if isinstance(said, list) else row
        messages: list[Message] = conversation(whole)["messages"]
    except Refused as refused:
        raise DataError(str(refused)) from None
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError("the conversation holds no user turn")
    return on_wire(messages)


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


def reply_text(value: Any) -> str:
    """Return an answer as text for a judge: text as it is, and of a list of messages what they say."""
    return transcript(value, "assistant") if isinstance(value, list) and value else as_text(value)


def transcript(messages: list[Message], alone: str = "user") -> str:
    """Return a conversation as text for a judge; one turn of the role `alone` is its text alone."""
    if len(messages) == 1 and messages[0].get("role") == alone and not messages[0].get("tool_calls"):
        return content_text(messages[0].get("content"))
    return "\n\n".join(f"[{m.get('role')}]\n{message_text(m)}" for m in messages)


def message_text(message: Message) -> str:
    """Return what a message says, and the tools that it calls."""
    calls = [f"calls {as_text(function)}" for function in calls_of(message)]
    return "\n".join([content_text(message.get("content")), *calls] if message.get("content") else calls)


def content_text(content: Any) -> str:
    """Return a message's content as text: of a list of parts, their texts, and the name of what is none."""
    if not isinstance(content, list):
        return as_text("" if content is None else content)
    return "\n".join(
        str(p.get("text", f"[{p.get('type', 'part')}]")) if isinstance(p, dict) else as_text(p) for p in content
    )
