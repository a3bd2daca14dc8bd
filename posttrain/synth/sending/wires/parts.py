"""What the wires share: parts of messages, calls of tools, and numbers that may be missing."""

import json
from typing import Any

from posttrain.synth.ledger.replies import parsed

SYSTEM = ("system", "developer")


def parts_of(content: Any) -> list[dict[str, Any]]:
    """Return content as parts in OpenAI's form; an empty text is none."""
    if content is None or content == "":
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def picture(part: dict[str, Any]) -> tuple[str, str] | None:
    """Return (media type, data as base64) of a part that is an image, or ("", address); None if it is none."""
    if part.get("type") != "image_url":
        return None
    given = part["image_url"]
    address = str(given["url"] if isinstance(given, dict) else given)
    if not address.startswith("data:"):
        return "", address
    kind, _, data = address.removeprefix("data:").partition(";base64,")
    return kind, data


def input_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call as an object."""
    given = call["function"].get("arguments") or {}
    given = parsed(given.encode("utf-8", "surrogatepass")) if isinstance(given, str) else given
    return given if isinstance(given, dict) else {}


def call_of(identity: Any, name: Any, given: Any) -> dict[str, Any]:
    """Return a call of a tool in OpenAI's form."""
    arguments = json.dumps(given or {}, ensure_ascii=False)
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def stops_of(body: dict[str, Any]) -> list[str]:
    """Return the texts at which a reply is to end."""
    given = body.get("stop") or []
    return [given] if isinstance(given, str) else list(given)


def count(value: Any) -> int:
    """Return a number of tokens; 0 for anything that is none."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**40 else 0


def object_of(value: Any) -> dict[str, Any]:
    """Return an object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def objects_in(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list; none for anything else."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def completion(
    message: dict[str, Any], reason: Any, usage: tuple[int, int, int], identity: Any = None, model: Any = None
) -> dict[str, Any]:
    """Return a chat completion with one choice; `usage` is (prompt, reply, cached prompt) tokens."""
    return {
        "id": identity, "object": "chat.completion", "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": usage[0], "completion_tokens": usage[1],
            "prompt_tokens_details": {"cached_tokens": usage[2]},
        },
    }  # fmt: skip
