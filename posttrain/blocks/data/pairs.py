"""Rows of preference data -> the chosen and the rejected conversation, and the messages that both share.

Recognised by column names: `chosen` and `rejected` beside a prompt (prompt, question, instruction, query, input or
conversations), or `chosen` and `rejected` alone as whole conversations: messages (OpenAI), from/value (ShareGPT), or
text with "Human:" and "Assistant:" turns (Anthropic's hh-rlhf). A `margin` says how much better the chosen side is.
"""

import math
import re
from typing import Any

from posttrain.blocks.data.schemas import CHATS, REPLIES, SYSTEM, Message, Refused, Sample, conversation
from posttrain.errors import DataError

CHOSEN, REJECTED = "chosen", "rejected"
PROMPTS = ("prompt", *CHATS, *(name for name in REPLIES if name != "prompt"))
"""Columns that may hold what both sides answer, in order of precedence."""
TURN = re.compile(r"\n\n(Human|Assistant):")


def pair(row: dict[str, Any]) -> Sample:
    """Return both conversations of a row, each with `shared`, the number of messages that they have in common.

    The prompt is found by comparing messages, never characters: only what follows the common ones is trained.

    Args:
        row: columns of any recognised schema.

    Raises:
        Refused: the row says too little, or its sides do not answer the same messages.
        DataError: the columns fit no schema.
    """
    missing = [name for name in (CHOSEN, REJECTED) if name not in row]
    if len(missing) == 2:
        raise DataError(
            f"columns {', '.join(map(repr, row)) or '(none)'} hold no {CHOSEN!r} and no {REJECTED!r}; say which is "
            "which with `columns` on the source, such as {prompt: question, chosen: good, rejected: bad}"
        )
    if missing:
        raise Refused(f"there is no {missing[0]!r}; if the column is called otherwise, say so with `columns`")
    prompt = _prompt(row)
    sides = [_side(row, name, prompt) for name in (CHOSEN, REJECTED)]
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


def _prompt(row: dict[str, Any]) -> list[Message]:
    """Return the messages in front of both replies; none where the sides are whole conversations."""
    asked = next((name for name in PROMPTS if row.get(name)), None)
    if asked is None:
        return []
    said = row[asked]
    if asked == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        said = f"{said}\n\n{row['input']}"  # as in schemas.py
    if isinstance(said, str) and asked not in CHATS:
        said = [{"role": "user", "content": said}]
    columns = {"messages": said, **{name: row[name] for name in (*SYSTEM, "tools") if row.get(name)}}
    found: list[Message] = conversation(columns)["messages"]
    return found


def _side(row: dict[str, Any], name: str, prompt: list[Message]) -> dict[str, Any]:
    """Return the whole conversation of one side."""
    said = row[name]
    if isinstance(said, dict):
        said = [said]
    if said is None or said == [] or (isinstance(said, str) and not said.strip()):
        raise Refused(f"{name} is empty")
    if isinstance(said, str) and not prompt:
        said = _dialogue(said, name)
    if isinstance(said, str):
        said = [*prompt, {"role": "assistant", "content": said}]
    rest = {column: row[column] for column in (*SYSTEM, "tools") if row.get(column)}
    whole = conversation({"messages": said} | rest)
    begin = whole["messages"]
    if prompt and begin[: len(prompt)] != prompt:
        replies = conversation({"messages": said})["messages"]
        if replies[0]["role"] in ("assistant", "tool"):
            whole["messages"] = [*prompt, *replies]
    return whole


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
