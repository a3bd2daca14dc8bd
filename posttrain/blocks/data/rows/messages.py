"""One message of any format in use -> `{"role", "content", ...}`, and what it says about being trained.

Roles and keys are those of OpenAI; ShareGPT's, LLaMA-Factory's, ms-swift's and Gemini's names are read as well.
"""

import json
from collections.abc import Collection, Iterator
from typing import Any

from posttrain.blocks.data.rows.media import Message, image_part, images_of
from posttrain.blocks.data.rows.refused import Refused, Unplaced, Unrendered

__all__ = ["Message", "Refused", "Unplaced", "Unrendered", "mark", "message", "text_of", "unmarked", "variants"]

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "chatbot": "assistant",
    "bot": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
    "environment": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""What others call a role -> what chat templates call it."""
CALLS = ("function_call", "tool_call")
"""Roles whose text is a tool call as JSON, or a list of them."""
WEIGHTS, FLAGS = ("weight", "loss_weight", "loss_scale"), ("train", "training")
DETAILS = ("train_detail", "training_detail")
MARKS = {*WEIGHTS, *FLAGS, *DETAILS, "loss"}
"""Keys of a message that say whether it is trained (see `mark`); no template gets to see them."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys that may hold what a reply was thought out with."""
KEYS = {"role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", *REASONING, *MARKS}
"""Keys of a message that are read, or that say only to whom a tool answers; templates may know others."""
Ranges = list[tuple[int, int]]


def message(found: Any, roles: Collection[str] = ROLES) -> Message:
    """Return a message with the keys that chat templates read, and whatever else it holds.

    Args:
        found: a message in any format.
        roles: names that it may have.

    Raises:
        Refused: it says too little, or something that text cannot hold.
    """
    if not isinstance(found, dict):
        raise Refused(f"a message is {type(found).__name__}, not an object with role and content")
    who = "from" if "from" in found and "role" not in found else "role"
    what = "value" if "value" in found and "content" not in found else "content"
    if who not in found:
        raise Refused(f"a message has the keys {', '.join(map(repr, found)) or '(none)'}, but no role")
    called, content = found[who], found.get(what)
    role = ALIASES.get(called.lower(), called.lower()) if isinstance(called, str) else called
    if not isinstance(role, str) or role not in roles:
        raise Refused(f"unknown role {called!r} (known: {', '.join([*roles, *ALIASES])})")
    rest = {key: value for key, value in found.items() if value is not None and key not in (who, what)}
    if called in CALLS and not rest.get("tool_calls"):
        rest, content = rest | {"tool_calls": _parsed(content, str(called))}, None
    if isinstance(legacy := rest.get("function_call"), dict):
        rest = {key: value for key, value in rest.items() if key != "function_call"} | {"tool_calls": [legacy]}
    if calls := rest.get("tool_calls"):
        rest["tool_calls"] = [_call(call) for call in listed(calls, "tool_calls")]
    content = _checked(content, may_be_null=bool(rest.get("tool_calls")), role=role)
    return {"role": role} | ({} if content is None else {"content": content}) | rest


def text_of(content: Any) -> str:
    """Return content, which may come in parts or be missing, as text; images have none."""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content or ""


def variants(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield messages as they are, then in other spellings that mean the same: which one works depends on the template.

    These are: every content as text (where there are no images), every content in parts, and null where there is none
    (beside tool calls).
    """
    yield messages
    text = [m | {"content": text_of(m.get("content"))} for m in messages]
    parts = [
        m if images_of(m) else m | {"content": [{"type": "text", "text": plain["content"]}]}
        for m, plain in zip(messages, text, strict=True)
    ]
    plain = [] if any(map(images_of, messages)) else [text]
    for other in (*plain, parts, [{"content": None} | m for m in messages]):
        if other != messages:
            yield other


def mark(found: Message) -> bool | Ranges | None:
    """Return what a message says about being trained: yes, no, only some of its characters, or nothing.

    `weight: 0` (OpenAI) and `loss: false` (ms-swift) say no, and their opposites nothing; `train` and `training`
    (Axolotl) say yes or no, whatever the role; `train_detail` lists characters as Axolotl does, ends included.

    Raises:
        Refused: a weight other than 0 and 1, or a mark that means nothing.
    """
    said: bool | Ranges | None = None
    if MARKS.isdisjoint(found):
        return said
    for key in (*WEIGHTS, "loss", *FLAGS, *DETAILS):
        value = found.get(key)
        if value is None:
            continue
        if key in DETAILS:
            said = said if said is False else _ranges(value, key)
        elif key in WEIGHTS and (isinstance(value, bool) or value not in (0, 1)):
            raise Refused(f"a message has {key} {value!r}: only 0 (not trained) and 1 are possible")
        elif key not in WEIGHTS and not isinstance(value, bool):
            raise Refused(f"a message has {key} {value!r}, not true or false")
        elif not value:
            said = False
        elif key in FLAGS and said is None:
            said = True
    return said


def unmarked(found: Message) -> Message:
    """Return a message without what it says about being trained."""
    return found if MARKS.isdisjoint(found) else {key: value for key, value in found.items() if key not in MARKS}


def tool(found: Any) -> Any:
    """Return a tool as chat templates expect it, `{"type": "function", "function": {...}}`."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            raise Refused("a tool is text that is no JSON") from None
    bare = isinstance(found, dict) and "name" in found and not {"type", "function"} & found.keys()
    return {"type": "function", "function": found} if bare else found


def listed(value: Any, column: str) -> list[Any]:
    """Return a list that may have been stored as a JSON string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refused(f"{column!r} is text, not a list") from None
    if not isinstance(value, list):
        raise Refused(f"{column!r} is not a list")
    return value


def _checked(content: Any, may_be_null: bool, role: str) -> Any:
    """Return the content of a message, with parts that are images as `media.image_part` writes them."""
    if content is None:
        if not may_be_null:
            raise Refused(f"the content of a message of role {role!r} is null")
    elif isinstance(content, list):
        return [_part(part) for part in content]
    elif not isinstance(content, str):
        raise Refused(f"the content of a message is {type(content).__name__}, not text")
    return content


def _part(part: Any) -> Any:
    if isinstance(part, dict):
        if (image := image_part(part)) is not None:
            return image
        if isinstance(part.get("text"), str) and part.get("type", "text").endswith("text"):
            return part
    raise Refused("a message has content parts other than text and images")


def _parsed(content: Any, role: str) -> list[Any]:
    """Return the tool calls that a message of ShareGPT holds as text."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        raise Refused(f"the text of a message of role {role!r} is no JSON") from None
    return calls if isinstance(calls, list) else [calls]


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


def _ranges(details: Any, key: str) -> Ranges:
    """Return the trained characters as pairs of begin and end, without the end."""
    found: Ranges = []
    for detail in listed(details, key):
        begin, end, train = (
            (detail.get(name) for name in ("begin_offset", "end_offset", "train"))
            if isinstance(detail, dict)
            else (None, None, None)
        )
        if type(begin) is not int or type(end) is not int or not isinstance(train, bool) or not 0 <= begin <= end:
            raise Refused(f"{key} does not hold begin_offset, end_offset and train")
        if train:
            found.append((begin, end + 1))
    return sorted(found)
