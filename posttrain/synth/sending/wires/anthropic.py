"""Anthropic's Messages interface: a chat in OpenAI's shape -> its request, its answer -> a chat completion.

Sources: docs.anthropic.com, api/messages, api/errors.
"""

from typing import Any

from posttrain.synth.sending.wires.dialect import Translated
from posttrain.synth.sending.wires.parts import (
    SYSTEM,
    call_of,
    completion,
    count,
    input_of,
    object_of,
    objects_in,
    parts_of,
    picture,
    stops_of,
)

PATH = "/messages"
REASONS = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
    "refusal": "content_filter",
}  # fmt: skip
"""Why it ended, in OpenAI's words; any other reason stays as it is."""
CACHE = ("cache_creation_input_tokens", "cache_read_input_tokens")
TRANSLATED = ("messages", "tools", "tool_choice", "stop", "max_completion_tokens")


def to_wire(body: dict[str, Any]) -> dict[str, Any]:
    """Return the request that a chat means: system turns at the top, tools and images in Anthropic's form."""
    messages: list[dict[str, Any]] = []
    system = []
    for message in body["messages"]:
        if message["role"] in SYSTEM:
            system += blocks(message.get("content"))
            continue
        role, content = turn(message)
        if messages and message["role"] == "tool" and messages[-1]["role"] == "user":
            messages[-1]["content"] += content  # all results of a turn are one message
        else:
            messages.append({"role": role, "content": content})
    made = {name: value for name, value in body.items() if name not in TRANSLATED}
    made["messages"] = messages
    if system:
        made["system"] = system
    made["max_tokens"] = body.get("max_completion_tokens") or body.get("max_tokens")
    if stops := stops_of(body):
        made["stop_sequences"] = stops
    if body.get("tools"):
        made["tools"] = [tool(given) for given in body["tools"]]
    if "tool_choice" in body:
        made["tool_choice"] = choice(body["tool_choice"])
    return made


def turn(message: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return (role, blocks) of a message."""
    content = [*(message.get("thinking_blocks") or []), *blocks(message.get("content"))]
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": content}
        return "user", [result]
    for call in message.get("tool_calls") or []:
        content.append(
            {"type": "tool_use", "id": call.get("id"), "name": call["function"]["name"], "input": input_of(call)}
        )
    return message["role"], content


def blocks(content: Any) -> list[dict[str, Any]]:
    """Return content as blocks; an empty text is none, which Anthropic refuses."""
    return [part(given) for given in parts_of(content)]


def part(given: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a message as a block: images by their data or their address."""
    if (found := picture(given)) is None:
        return given
    kind, data = found
    if not kind:
        return {"type": "image", "source": {"type": "url", "url": data}}
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def tool(given: dict[str, Any]) -> dict[str, Any]:
    """Return a tool; one that is in Anthropic's form already stays."""
    function = given.get("function")
    if not isinstance(function, dict):
        return given
    made = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    return made | ({"description": function["description"]} if function.get("description") else {})


def choice(given: Any) -> dict[str, Any]:
    """Return which tool is to be called."""
    if isinstance(given, dict):
        return {"type": "tool", "name": given["function"]["name"]} if "function" in given else given
    return {"type": {"required": "any"}.get(given, given)}


def from_wire(reply: Any) -> Any:
    """Return an answer as a chat completion; anything else, such as an error, as it is."""
    if not isinstance(reply, dict) or reply.get("type") != "message" or not isinstance(reply.get("content"), list):
        return reply
    found = objects_in(reply["content"])
    text = "".join(str(b.get("text") or "") for b in found if b.get("type") == "text")
    thought = "".join(str(b.get("thinking") or "") for b in found if b.get("type") == "thinking")
    calls = [call_of(b.get("id"), b.get("name"), b.get("input")) for b in found if b.get("type") == "tool_use"]
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    message |= ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
    if calls and (signed := [b for b in found if b.get("type") in ("thinking", "redacted_thinking")]):
        message["thinking_blocks"] = signed  # a model that goes on after its calls wants to see what it thought
    used = object_of(reply.get("usage"))
    counts = {name: count(used.get(name)) for name in ("input_tokens", "output_tokens", *CACHE)}
    given = sum(counts[name] for name in ("input_tokens", *CACHE))
    reason = REASONS.get(str(reply.get("stop_reason")), reply.get("stop_reason"))
    tokens = given, counts["output_tokens"], counts[CACHE[1]]
    return completion(message, reason, tokens, reply.get("id"), reply.get("model"))


MESSAGES = Translated(lambda _: PATH, to_wire, from_wire)
