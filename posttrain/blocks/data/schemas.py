"""Rows of the schemas in use -> one conversation: `{"messages": [{"role", "content", ...}], "tools"?: [...]}`.

Recognised by column names: messages (OpenAI), conversations (ShareGPT: from/value), prompt with completion or
response, instruction with input and output (Alpaca), question/answer, query/response, problem/solution.
"""

import json
from collections.abc import Collection
from typing import Any

import attrs

from posttrain.errors import DataError

Message = dict[str, Any]

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
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "developer": "developer",
}  # fmt: skip


class Refused(Exception):
    """A row that cannot become training data; the message is the reason that the ledger counts."""


@attrs.frozen
class Sample:
    """What a row says: a conversation, or several that stay together, and perhaps a number."""

    conversations: list[dict[str, Any]]
    values: dict[str, Any] = attrs.field(factory=dict)


def conversation(row: dict[str, Any], roles: Collection[str] = ROLES) -> dict[str, Any]:
    """Return the conversation that a row holds.

    Args:
        row: columns of any recognised schema.
        roles: names that a message may have.

    Raises:
        Refused: the row fits a schema but says too little or too much.
        DataError: the columns fit no schema.
    """
    chat = next((name for name in CHATS if isinstance(row.get(name), list | str)), None)
    messages = _listed(row[chat], chat) if chat else _paired(row)
    if not messages:
        raise Refused("the conversation is empty")
    tools = row.get("tools")
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    checked = [_message(message, roles) for message in messages]
    if system is not None and checked[0]["role"] != "system":
        checked.insert(0, {"role": "system", "content": system})
    return {"messages": checked} | ({"tools": _listed(tools, "tools")} if tools else {})


def _paired(row: dict[str, Any]) -> list[Message]:
    """Return the messages of a row with a column for the prompt and one for the reply."""
    asked = [name for name in REPLIES if name in row]
    pairs = [(ask, reply) for ask in asked for reply in REPLIES[ask] if row.get(reply) is not None]
    if not pairs and asked:
        raise Refused(f"no reply: there is {asked[0]!r}, but no {' or '.join(map(repr, REPLIES[asked[0]]))}")
    if not pairs:
        known = ["messages", "conversations", *(f"{ask}/{reply[0]}" for ask, reply in REPLIES.items())]
        raise DataError(
            f"columns {', '.join(map(repr, row)) or '(none)'} fit no known schema ({', '.join(known)}); "
            "say which is which with `columns` on the source, such as {prompt: q, response: a}"
        )
    ask, reply = pairs[0]
    prompt, answer = row[ask], row[reply]
    context = row.get("input") if ask == "instruction" else None
    if isinstance(context, str) and context.strip():
        prompt = f"{prompt}\n\n{context}"  # as torchtune and the Alpaca authors' own chat models join them
    return _turn(prompt, "user") + _turn(answer, "assistant")


def _turn(value: Any, role: str) -> list[Message]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(message: Any, roles: Collection[str]) -> Message:
    """Return a message with the keys that chat templates read."""
    if not isinstance(message, dict):
        raise Refused(f"a message is {type(message).__name__}, not an object with role and content")
    if "from" in message and "role" not in message:
        role, content = message["from"], message.get("value")
        role = SHAREGPT.get(role, role) if isinstance(role, str) else role
        rest: Message = {}
    else:
        role, content = message.get("role"), message.get("content")
        rest = {k: v for k, v in message.items() if v is not None and k not in ("role", "content")}
    if not isinstance(role, str) or role not in roles:
        raise Refused(f"unknown role {role!r}")
    if calls := rest.get("tool_calls"):
        rest["tool_calls"] = [_call(call) for call in _listed(calls, "tool_calls")]
    _check_content(content, may_be_null=bool(rest.get("tool_calls")), role=str(role))
    return {"role": role} | ({} if content is None else {"content": content}) | rest


def _check_content(content: Any, may_be_null: bool, role: str) -> None:
    if content is None:
        if not may_be_null:
            raise Refused(f"the content of a message of role {role!r} is null")
    elif isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise Refused("a message has content parts other than text")
    elif not isinstance(content, str):
        raise Refused(f"the content of a message is {type(content).__name__}, not text")


def _call(call: Any) -> Message:
    """Return a tool call whose arguments are an object: OpenAI stores a string, templates expect the object."""
    if not isinstance(call, dict):
        raise Refused("a tool call is not an object")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    if not isinstance(function.get("name"), str):
        raise Refused("a tool call has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        function = function | ({"arguments": parsed} if isinstance(parsed, dict) else {})
    return call | {"function": function} if "function" in call else {"type": "function", "function": function}


def _listed(value: Any, column: str) -> list[Any]:
    """Return a list that may have been stored as a JSON string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refused(f"{column!r} is text, not a list") from None
    if not isinstance(value, list):
        raise Refused(f"{column!r} is not a list")
    return value
