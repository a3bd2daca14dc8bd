"""Amazon Bedrock's Converse: a chat in OpenAI's shape -> its request, its answer -> a chat completion.

Source: the service model bedrock-runtime 2023-09-30 in botocore 1.44.8 (operation Converse).
"""

from typing import Any
from urllib.parse import quote

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

CONFIG = {"temperature": "temperature", "top_p": "topP"}
OWN = (
    "additionalModelRequestFields", "guardrailConfig", "performanceConfig", "serviceTier", "requestMetadata",
    "additionalModelResponseFieldPaths", "outputConfig", "promptVariables",
)  # fmt: skip
"""Keys of Converse that are passed on as they are."""
TRANSLATED = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
)
KNOWN = {*CONFIG, *OWN, *TRANSLATED}
REASONS = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "model_context_window_exceeded": "length",
    "tool_use": "tool_calls", "guardrail_intervened": "content_filter", "content_filtered": "content_filter",
}  # fmt: skip
FORMATS = {"image/png": "png", "image/jpeg": "jpeg", "image/gif": "gif", "image/webp": "webp"}


def to_wire(body: dict[str, Any]) -> dict[str, Any]:
    """Return the request that a chat means."""
    messages: list[dict[str, Any]] = []
    system: list[dict[str, Any]] = []
    for message in body["messages"]:
        if message["role"] in SYSTEM:
            system += [block(given) for given in parts_of(message.get("content"))]
            continue
        role, content = turn(message)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += content  # turns must alternate, and all results of calls are one
        else:
            messages.append({"role": role, "content": content})
    made: dict[str, Any] = {"messages": messages, **{name: body[name] for name in OWN if name in body}}
    if system:
        made["system"] = system
    config = {theirs: body[ours] for ours, theirs in CONFIG.items() if body.get(ours) is not None}
    if limit := body.get("max_completion_tokens") or body.get("max_tokens"):
        config["maxTokens"] = limit
    if stops := stops_of(body):
        config["stopSequences"] = stops
    if config:
        made["inferenceConfig"] = config
    if body.get("tools") and body.get("tool_choice") != "none":
        made["toolConfig"] = {"tools": [tool(given) for given in body["tools"]]}
        if "tool_choice" in body:
            made["toolConfig"]["toolChoice"] = choice(body["tool_choice"])
    return made


def turn(message: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return (role, blocks) of a message."""
    content = [block(given) for given in parts_of(message.get("content"))]
    if message["role"] == "tool":
        result = {"toolUseId": message.get("tool_call_id"), "content": content or [{"text": "(nothing)"}]}
        return "user", [{"toolResult": result}]
    thoughts = [thought(given) for given in message.get("thinking_blocks") or []]
    for call in message.get("tool_calls") or []:
        use = {"toolUseId": call.get("id"), "name": call["function"]["name"], "input": input_of(call)}
        content.append({"toolUse": use})
    return message["role"], [*thoughts, *content]


def block(given: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a message as a block: text, or an image by its data."""
    if (found := picture(given)) is None:
        return {"text": given["text"]} if given.get("type") == "text" else given
    kind, data = found
    return {"image": {"format": FORMATS.get(kind, "png"), "source": {"bytes": data}}}


def thought(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a model thought, as it wants to see it again."""
    if given.get("type") == "redacted_thinking":
        return {"reasoningContent": {"redactedContent": given.get("data")}}
    signed = {"signature": given["signature"]} if given.get("signature") else {}
    return {"reasoningContent": {"reasoningText": {"text": given.get("thinking"), **signed}}}


def tool(given: dict[str, Any]) -> dict[str, Any]:
    """Return a tool; one that is in Converse's form already stays."""
    function = given.get("function")
    if not isinstance(function, dict):
        return given
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    about = {"description": function["description"]} if function.get("description") else {}
    return {"toolSpec": {"name": function["name"], **about, "inputSchema": {"json": schema}}}


def choice(given: Any) -> dict[str, Any]:
    """Return which tool is to be called."""
    if isinstance(given, dict):
        return {"tool": {"name": given["function"]["name"]}} if "function" in given else given
    return {"any": {}} if given == "required" else {"auto": {}}


def from_wire(reply: Any, model: str = "") -> Any:
    """Return an answer as a chat completion; anything else, such as an error, as it is."""
    said = object_of(object_of(reply.get("output")).get("message")) if isinstance(reply, dict) else {}
    if not isinstance(said.get("content"), list):
        return reply
    found = objects_in(said["content"])
    text = "".join(str(b["text"]) for b in found if isinstance(b.get("text"), str))
    blocks = [thinking(object_of(b["reasoningContent"])) for b in found if "reasoningContent" in b]
    thoughts = "".join(str(b.get("thinking") or "") for b in blocks)
    uses = [object_of(b["toolUse"]) for b in found if "toolUse" in b]
    calls = [call_of(use.get("toolUseId"), use.get("name"), use.get("input")) for use in uses]
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    message |= ({"reasoning_content": thoughts} if thoughts else {}) | ({"tool_calls": calls} if calls else {})
    if calls and blocks:
        message["thinking_blocks"] = blocks
    used = object_of(reply.get("usage"))
    cached, written = count(used.get("cacheReadInputTokens")), count(used.get("cacheWriteInputTokens"))
    tokens = count(used.get("inputTokens")) + cached + written, count(used.get("outputTokens")), cached
    reason = REASONS.get(str(reply.get("stopReason")), reply.get("stopReason"))
    return completion(message, reason, tokens, model=model or None)


def thinking(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a model thought, in the form that other providers have for it."""
    if "redactedContent" in given:
        return {"type": "redacted_thinking", "data": given["redactedContent"]}
    said = object_of(given.get("reasoningText"))
    return {"type": "thinking", "thinking": said.get("text"), "signature": said.get("signature")}


CONVERSE = Translated(lambda model: f"/model/{quote(model, safe='')}/converse", to_wire, from_wire)
"""Names of models hold colons and slashes."""
