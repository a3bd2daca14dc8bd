"""Rows of the schemas in use -> one conversation: `{"messages": [{"role", "content", ...}], "tools"?: [...]}`.

Recognised by column names: messages (OpenAI), conversations (ShareGPT: from/value), prompt with completion or
response, instruction with input and output (Alpaca, also with history), question/answer, query/response,
problem/solution. Which of them a row fits, and which columns are read, is decided in one place, `schema`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Set
from typing import Any

import attrs

from posttrain.blocks.data.rows.media import column_of, placed
from posttrain.blocks.data.rows.messages import KEYS, ROLES, Message, Refused, listed, message, text_of, tool
from posttrain.errors import DataError

__all__ = ["CHATS", "REPLIES", "Message", "Reading", "Refused", "Sample", "Schema", "conversation", "filled", "schema"]

CHATS = ("messages", "conversations", "conversation")
REPLIES = {
    "prompt": ("completion", "response"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response", "answer"),
    "problem": ("solution", "answer"),
    "input": ("output",),
}
"""Column of the user's turn -> columns that may hold the reply, in order of precedence."""
SYSTEM = ("system", "system_prompt")
CONTEXT = ("input", "context")
"""Columns that may hold what an `instruction` is about."""
TOOLS = ("tools", "functions")
VERDICTS = ("label", "kto_tag")
"""Columns that say of a reply whether it is a good one (KTO)."""
SHARED = (*SYSTEM, *TOOLS, "chat_template_kwargs")
"""Columns that are read beside those of any schema."""


@attrs.frozen
class Sample:
    """What a row says: a conversation, or several that stay together, and the values that go along."""

    conversations: list[dict[str, Any]]
    values: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Schema:
    """How a row was understood."""

    name: str
    """The columns that tell it: `messages`, `prompt/completion`."""
    columns: tuple[str, ...]
    """Those that are read."""


@attrs.define
class Reading:
    """Which columns of a source are read, and as what."""

    schemas: Counter[str] = attrs.field(factory=Counter)
    """Rows that were understood as each schema."""
    read: set[str] = attrs.field(factory=set)
    found: set[str] = attrs.field(factory=set)
    """All that hold anything."""
    keys: Set[str] = frozenset(KEYS)
    """Keys of a message that are read, or that a template may read; others are noted as `messages.key`."""

    def note(
        self, row: dict[str, Any], schema: Callable[[dict[str, Any]], Schema] | None, kept: Iterable[str] = ()
    ) -> None:
        """Take note of a row, of which some columns go along; without a schema, only the block knows what it reads."""
        if schema is None:
            return
        try:
            understood = schema(row)
        except (Refused, DataError):
            return
        self.schemas[understood.name] += 1
        self.read.update(understood.columns, kept)
        self.found.update(name for name, value in row.items() if filled(value))
        for name in CHATS:
            for each in row[name] if name in understood.columns and isinstance(row[name], list) else ():
                if isinstance(each, dict):
                    self.found.update(f"{name}.{key}" for key in each.keys() - self.keys if filled(each[key]))

    def add(self, other: "Reading") -> None:
        """Add what was read elsewhere of the same source."""
        self.schemas.update(other.schemas)
        self.read |= other.read
        self.found |= other.found

    def summary(self) -> dict[str, Any]:
        """Return what the ledger says; nothing if only the data block knows what it reads."""
        if not self.schemas:
            return {}
        read = [name for name in self.read if name in self.found]
        unused = sorted(self.found - self.read)
        return {"schema": " and ".join(sorted(self.schemas)), "read": sorted(read), "unused": unused}


def filled(value: Any) -> bool:
    """Whether a column says anything in this row; tables have null or nothing where a row has no such column."""
    return value is not None and value != "" and value != []


def schema(row: dict[str, Any]) -> Schema:
    """Return how the columns of a row are understood.

    Raises:
        Refused: the row fits a schema but says too little.
        DataError: the columns fit no schema.
    """
    chats = [name for name in CHATS if isinstance(row.get(name), list | str)]
    asked = [name for name in REPLIES if name in row]
    pairs = [(ask, reply) for ask in asked for reply in REPLIES[ask] if row.get(reply) is not None]
    if said := [name for name in chats if filled(row[name])] or (chats if not pairs else []):
        return Schema(said[0], (said[0], *beside(row)))
    if not pairs and {"chosen", "rejected"} <= row.keys():
        raise DataError("rows have a 'chosen' and a 'rejected' side, and no single reply: that is data for `type: dpo`")
    if not pairs and asked:
        raise Refused(f"no reply: there is {asked[0]!r}, but no {' or '.join(map(repr, REPLIES[asked[0]]))}")
    if not pairs:
        known = ["messages", "conversations", *(f"{ask}/{reply[0]}" for ask, reply in REPLIES.items())]
        raise DataError(
            f"columns {', '.join(map(repr, row)) or '(none)'} fit no known schema ({', '.join(known)}); "
            "say which is which with `columns` on the source, such as {prompt: q, response: a}"
            + ("; plain text is for `type: causal`" if "text" in row else "")
        )
    ask, reply = pairs[0]
    return Schema(f"{ask}/{reply}", (ask, *around(row, ask), reply, *beside(row)))


def conversation(row: dict[str, Any], roles: Collection[str] = ROLES) -> dict[str, Any]:
    """Return the conversation that a row holds.

    Args:
        row: columns of any recognised schema.
        roles: names that a message may have.

    Returns:
        `messages`, and perhaps `tools` and `template_args`, further variables of the chat template.

    Raises:
        Refused: the row fits a schema but says too little or too much.
        DataError: the columns fit no schema.
    """
    found = schema(row)
    if bad := next((name for name in VERDICTS if str(row.get(name)).strip().lower() == "false"), None):
        raise Refused(f"{bad!r} is false: the reply is one to avoid (KTO), not one to learn")
    if found.name in CHATS:
        messages = listed(row[found.name], found.name)
    else:
        ask, reply = found.name.split("/")
        messages = [*prompt_of(row, ask), *_turn(row[reply], "assistant")]
    if not messages:
        raise Refused("the conversation is empty")
    said = placed([message(each, roles) for each in messages], row)
    made: dict[str, Any] = {"messages": _led(row, said)}
    if tools := next((row[name] for name in TOOLS if filled(row.get(name))), None):
        made |= {"tools": found_tools} if (found_tools := [tool(each) for each in listed(tools, "tools")]) else {}
    if variables := row.get("chat_template_kwargs"):
        if not isinstance(variables, dict):
            raise Refused("'chat_template_kwargs' is not an object")
        made["template_args"] = variables
    return made


def prompt_of(row: dict[str, Any], ask: str) -> list[Any]:
    """Return the messages in front of a reply: Alpaca's history, and what is asked."""
    asked, before = row[ask], []
    for name in around(row, ask):
        if name == "history":
            before = [one for ours, theirs in row[name] for one in (*_turn(ours, "user"), *_turn(theirs, "assistant"))]
        else:  # as torchtune and the Alpaca authors' own chat models join them
            asked = f"{asked}\n\n{row[name]}"
    return [*before, *_turn(asked, "user")]


def around(row: dict[str, Any], ask: str) -> tuple[str, ...]:
    """Return the columns that are read with a prompt: what an `instruction` is about, and what was said before."""
    contexts = CONTEXT if ask == "instruction" else ()
    about = [name for name in contexts if isinstance(row.get(name), str) and row[name].strip()]
    history = row.get("history")
    told = isinstance(history, list) and history and all(isinstance(t, list) and len(t) == 2 for t in history)
    return (*about[:1], *(["history"] if told else []))


def beside(row: dict[str, Any]) -> list[str]:
    """Return the columns that are read beside those of any schema."""
    groups = (SYSTEM, TOOLS, ("chat_template_kwargs",), *((name,) for name in VERDICTS))
    firsts = (next((name for name in names if filled(row.get(name))), None) for names in groups)
    return [name for name in (*firsts, column_of(row)) if name]


def _led(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Return the messages behind that of a system column."""
    said = next((row[name] for name in SYSTEM if filled(row.get(name))), None)
    if said is None:
        return messages
    if not isinstance(said, str | list):
        raise Refused(f"the system prompt is {type(said).__name__}, not text")
    content = message({"role": "system", "content": said})["content"]
    if not text_of(content).strip():
        return messages
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": content}, *messages]
    if text_of(messages[0].get("content")).strip() != text_of(content).strip():
        raise Refused("there are two system prompts: a column, and another one in the messages")
    return messages


def _turn(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]
