"""Rows of preference data -> the chosen and the rejected conversation, and the messages that both share.

Recognised by column names: `chosen` and `rejected` beside a prompt (prompt, question, instruction, query, input or
conversations), or `chosen` and `rejected` alone as whole conversations: messages (OpenAI), from/value (ShareGPT), or
text with "Human:" and "Assistant:" turns (Anthropic's hh-rlhf). OpenAI's own format (`input`, `preferred_output`,
`non_preferred_output`) is read too. A `margin` says how much better the chosen side is.
"""

import math
import re
from typing import Any

from posttrain.blocks.data.rows.media import placed
from posttrain.blocks.data.rows.schemas import (
    CHATS,
    REPLIES,
    SHARED,
    Message,
    Refused,
    Sample,
    Schema,
    around,
    beside,
    conversation,
    filled,
    prompt_of,
)
from posttrain.errors import DataError

CHOSEN, REJECTED = "chosen", "rejected"
SIDES = {
    CHOSEN: (CHOSEN, "preferred_output", "chosen_response"),
    REJECTED: (REJECTED, "non_preferred_output", "rejected_response"),
}
"""Side -> columns that may hold it."""
PROMPTS = ("prompt", *CHATS, *(name for name in REPLIES if name != "prompt"))
"""Columns that may hold what both sides answer, in order of precedence."""
TURN = re.compile(r"\n\n(Human|Assistant):")


def pair_schema(row: dict[str, Any]) -> Schema:
    """Return how the columns of a row are understood.

    Raises:
        Refused: one side is missing.
        DataError: both are.
    """
    row = _with_chosen(row)
    found = {side: next((name for name in names if name in row), None) for side, names in SIDES.items()}
    missing = [side for side, name in found.items() if name is None]
    if len(missing) == 2:
        raise DataError(
            f"columns {', '.join(map(repr, row)) or '(none)'} hold no {CHOSEN!r} and no {REJECTED!r}; say which is "
            "which with `columns` on the source, such as {prompt: question, chosen: good, rejected: bad}"
        )
    if missing:
        raise Refused(f"there is no {missing[0]!r}; if the column is called otherwise, say so with `columns`")
    sides = [str(found[side]) for side in SIDES]
    asked = next((name for name in PROMPTS if row.get(name)), None)
    more = (asked, *around(row, asked)) if asked else ()
    return Schema("/".join(sides), (*more, *sides, *beside(row), *(["margin"] if "margin" in row else [])))


def pair(row: dict[str, Any]) -> Sample:
    """Return both conversations of a row, each with `shared`, the number of messages that they have in common.

    The prompt is found by comparing messages, never characters: only what follows the common ones is trained.

    Args:
        row: columns of any recognised schema.

    Raises:
        Refused: the row says too little, or its sides do not answer the same messages.
        DataError: the columns fit no schema.
    """
    row = _with_chosen(row)
    names = pair_schema(row).name.split("/")
    if isinstance(asked := row.get("input"), dict) and "messages" in asked:  # OpenAI's format for preferences
        row = {key: value for key, value in row.items() if key != "input"} | asked
    prompt = _prompt(row)
    sides = [_side(row, name, prompt) for name in names]
    shared = 0
    for ours, theirs in zip(*(side["messages"] for side in sides), strict=False):
        if ours != theirs:
            break
        shared += 1
    if [side["messages"][shared:] for side in sides] == [[], []]:
        raise Refused("chosen and rejected are equal")
    if not shared or any(side["messages"][shared:] == [] for side in sides):
        raise Refused("chosen and rejected do not answer the same messages")
    if any(side["messages"][shared]["role"] != "assistant" for side in sides):
        raise Refused("chosen and rejected differ before a reply: in a message of another role than assistant")
    return Sample([side | {"shared": shared} for side in sides], {"margins": _margin(row)})


def _with_chosen(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of ms-swift's, whose messages end with the chosen reply, as others write it."""
    messages = row.get("messages")
    if "rejected_response" not in row or any(name in row for name in SIDES[CHOSEN]) or not isinstance(messages, list):
        return row
    return {**row, "messages": messages[:-1], CHOSEN: messages[-1:]}


def _prompt(row: dict[str, Any]) -> list[Message]:
    """Return the messages in front of both replies; none where the sides are whole conversations."""
    asked = next((name for name in PROMPTS if row.get(name)), None)
    if asked is None:
        return []
    said = row[asked] if asked in CHATS else prompt_of(row, asked)
    found: list[Message] = conversation({"messages": said} | _shared(row))["messages"]
    return found


def _shared(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in SHARED if filled(row.get(name))}


def _side(row: dict[str, Any], name: str, prompt: list[Message]) -> dict[str, Any]:
    """Return the whole conversation of one side."""
    said = row[name]
    if isinstance(said, dict):
        said = [said]
    if not filled(said) or (isinstance(said, str) and not said.strip()):
        raise Refused(f"{name} is empty")
    if isinstance(said, str) and not prompt:
        said = _dialogue(said, name)
    if isinstance(said, str):
        said = [*prompt, {"role": "assistant", "content": said}]
    whole = conversation({"messages": said} | _shared(row))
    begin = whole["messages"]
    if prompt and begin[: len(prompt)] != prompt:
        replies = conversation({"messages": said})["messages"]
        if replies[0]["role"] in ("assistant", "tool"):
            whole["messages"] = [*prompt, *replies]
    return whole | {"messages": placed(whole["messages"], row)}


def _dialogue(text: str, name: str) -> list[Message]:
    """Return the messages of a dialogue written as text, as hh-rlhf does."""
    before, *turns = TURN.split(text)
    if not turns or before.strip():
        raise Refused(f"{name} is text, but there is no prompt, and it holds no 'Human:' and 'Assistant:' turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _margin(row: dict[str, Any]) -> float:
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise Refused(f"the margin is {type(margin).__name__}, not a number")
    return float(margin)
