"""Markers around every string of a conversation: private-use characters that say where each one ended up in a text."""

import re
from typing import Any

import attrs

from posttrain.blocks.data.rows.messages import REASONING, Refused

START, END = "\ue000", "\ue001"
MARK = re.compile("([\ue000\ue001])([\ue100-\ue4ff])([\ue500-\ue8ff])")


@attrs.frozen
class Piece:
    """A marked string, or part of one."""

    message: int
    lead: str | None
    """What the string holds before this piece, if it is its first; None for later ones."""
    kind: str
    """`content`, `reasoning` or `call`."""


class Marker:
    """Puts markers into the strings of one conversation, inside their outer whitespace.

    A string is cut at the tags that the template itself mentions (`</think>`), which stay outside of the markers:
    templates compare and split at them.
    """

    def __init__(self, tags: re.Pattern[str] | None) -> None:
        self.tags = tags
        self.pieces: list[Piece] = []

    def conversation(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return marked copies of the messages; `pieces` then says what each marker stands for."""
        return [self._message(index, message) for index, message in enumerate(messages)]

    def _message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        content = message.get("content")
        if isinstance(content, str):
            marked["content"] = self._text(content, index, "content")
        elif isinstance(content, list):
            marked["content"] = [
                part | {"text": self._text(part["text"], index, "content")} if "text" in part else part
                for part in content
            ]
        reasoning = next((message[name] for name in REASONING if isinstance(message.get(name), str)), None)
        if reasoning is not None:
            text = self._text(reasoning, index, "reasoning")
            marked |= {name: text for name in REASONING if name in message}
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, index) for call in calls]
        return marked

    def _call(self, call: dict[str, Any], index: int) -> dict[str, Any]:
        function = call["function"]
        marked = function | {"name": self._text(function["name"], index, "call")}
        if "arguments" in function:
            marked["arguments"] = self._values(function["arguments"], index)
        return call | {"function": marked}

    def _values(self, value: Any, index: int) -> Any:
        if isinstance(value, str):
            return self._text(value, index, "call")
        if isinstance(value, list):
            return [self._values(item, index) for item in value]
        if isinstance(value, dict):
            return {key: self._values(item, index) for key, item in value.items()}
        return value

    def _text(self, text: str, message: int, kind: str) -> str:
        parts = self.tags.split(text) if self.tags is not None and "<" in text else [text]
        marked, lead, first = [], "", True
        for number, part in enumerate(parts):
            core = part.strip()
            if number % 2 or not core:  # odd parts are the tags
                marked.append(part)
            else:
                before, _, behind = part.partition(core)
                code = self._code(Piece(message, lead + before if first else None, kind))
                marked.append(f"{before}{START}{code}{core}{END}{code}{behind}")
                first = False
            lead += part
        return "".join(marked)

    def _code(self, piece: Piece) -> str:
        number = len(self.pieces)
        if number >= 1 << 20:
            raise Refused("more than a million strings in one conversation")
        self.pieces.append(piece)
        return chr(0xE100 + (number >> 10)) + chr(0xE500 + (number & 1023))


def without_markers(marked: str, known: list[Piece]) -> tuple[str, list[tuple[Piece, int, int]]]:
    """Return the text without markers, and the places of the pieces in it."""
    parts = MARK.split(marked)
    text, length, opened = [parts[0]], len(parts[0]), None
    pieces: list[tuple[Piece, int, int]] = []
    for n in range(1, len(parts), 4):
        number = (ord(parts[n + 1]) - 0xE100 << 10) + ord(parts[n + 2]) - 0xE500
        if parts[n] == START and opened is None:
            opened, began = number, length
        elif parts[n] == END and opened == number:
            pieces.append((known[number], began, length))
            opened = None
        else:
            raise Refused("the chat template cuts the text of the messages into pieces")
        text.append(parts[n + 3])
        length += len(parts[n + 3])
    if opened is not None:
        raise Refused("the chat template cuts the text of the messages into pieces")
    return "".join(text), pieces
