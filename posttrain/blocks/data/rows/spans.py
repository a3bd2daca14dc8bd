"""Where in a rendered conversation its messages are, and that none of them is missing."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import attrs

from posttrain.blocks.data.rows.markers import Piece
from posttrain.blocks.data.rows.messages import Ranges, Refused, Unplaced, text_of


@attrs.frozen
class Layout:
    """A conversation as text, with the places of its pieces in characters."""

    messages: list[dict[str, Any]]
    text: str
    pieces: list[tuple[Piece, int, int]]
    """Each with its start and end, in the order of the text."""
    stops: re.Pattern[str]
    """What ends a turn."""
    prompt: str
    """What asks the model for a reply; may be empty."""
    plain: Callable[[list[dict[str, Any]]], str]
    """Renders other messages in the same way."""
    places: defaultdict[int, list[int]] = attrs.field(init=False, factory=lambda: defaultdict(list))
    """Of each message, the numbers of its pieces."""

    def __attrs_post_init__(self) -> None:
        for number, (piece, _, _) in enumerate(self.pieces):
            self.places[piece.message].append(number)

    def spans(self, index: int, characters: bool | Ranges) -> list[tuple[int, int]]:
        """Return the trained parts of a message.

        Args:
            index: of the message.
            characters: True, or which characters of its text are trained. What the template writes in front of the
                text goes with the first character, the end of the turn with the last.

        Raises:
            Refused: they cannot be told for certain.
        """
        span = self._whole(index)
        if isinstance(characters, bool):
            return [span]
        content = self.messages[index].get("content")
        first = next(((p, at) for p, at, _ in self.pieces if p.message == index and p.kind == "content"), None)
        if not isinstance(content, str) or first is None or first[0].lead is None:
            raise Refused("train_detail counts the characters of a text, and the message has none")
        zero = first[1] - len(first[0].lead)  # where its first character is, or would be
        core = content.strip()
        begin = zero + content.index(core)
        if not self.text.startswith(core, begin):
            raise Refused("the chat template rewrites a message, so the characters of train_detail cannot be found")
        found = []
        for start, end in characters:
            if end > len(content):
                raise Refused(f"train_detail reaches to character {end - 1} of a text of {len(content)}")
            from_first, to_last = zero + start <= begin, zero + end >= begin + len(core)
            found.append((span[0] if from_first else zero + start, span[1] if to_last else zero + end))
        return found

    def turns(self) -> list[tuple[int, str]]:
        """Return the end and the role of each message found, in the order of the text."""
        turns = []
        for number, (piece, _, end) in enumerate(self.pieces):
            follower = self.pieces[number + 1] if number + 1 < len(self.pieces) else None
            if follower is None or follower[0].message != piece.message:
                stop = self.stops.search(self.text, end, follower[1] if follower else len(self.text))
                turns.append((stop.end() if stop else end, str(self.messages[piece.message]["role"])))
        return turns

    def refuse_left_out(self, given: list[Piece], trained: Collection[int]) -> None:
        """Refuse what the template swallows of the pieces that it was given.

        Of a reply that is only context, thoughts and the like may go: the model will not see them either.

        Raises:
            Refused: something is missing, or null has become the word None.
        """
        there, shown = {id(piece) for piece, _, _ in self.pieces}, {piece.message for piece, _, _ in self.pieces}
        for piece in given:
            role = self.messages[piece.message]["role"]
            if piece.message not in shown and piece.kind == "content":
                raise Refused(f"the chat template leaves out a message of role {role!r}")
            context = role == "assistant" and piece.message not in trained and piece.message in shown
            if id(piece) in there or context:
                continue
            what = {"reasoning": "the reasoning", "call": "a tool call"}.get(piece.kind, "a part of the text")
            later = any(each["role"] == "user" for each in self.messages[piece.message :]) and piece.kind != "call"
            raise Refused(
                f"the chat template leaves out {what} of a message of role {role!r}"
                + ("; data.split_turns=true makes a document of each turn, as it was generated" if later else "")
            )
        if any(each.get("content", "") is None for each in self.messages):
            edges = [0, *(edge for _, start, end in self.pieces for edge in (start, end)), len(self.text)]
            if any("None" in self.text[start:end] for start, end in list(pairwise(edges))[::2]):
                raise Refused("the chat template writes None where a message has no text")

    def _whole(self, index: int) -> tuple[int, int]:
        """Return where a trained message starts and ends."""
        message = self.messages[index]
        role = message["role"]
        if not text_of(message.get("content")).strip() and not message.get("tool_calls"):
            # Nothing marks where it is, and behind reasoning the first token that ends something is not its end.
            raise Unplaced(f"a message of role {role!r} is empty")
        order = self._order(index)
        if not order:
            raise Unplaced(f"a message of role {role!r} holds nothing but tags of the chat template's own")
        first, last = order[0], order[-1]
        if last - first >= len(order):
            raise Unplaced("the chat template mixes a trained message with another one")
        if len({id(self.pieces[n][0]) for n in order}) < len(order):
            raise Unplaced("the chat template writes a trained message more than once")
        after = self.pieces[last + 1][1] if last + 1 < len(self.pieces) else len(self.text)
        end = self.stops.search(self.text, self.pieces[last][2], after)
        if end is None:
            raise Unplaced(
                f"after a message of role {role!r} the chat template writes no end-of-turn token, so the model would "
                "never learn to stop: add {{ eos_token }} behind its content, with `tokenizer.chat_template`"
            )
        return self._start(first, role), end.end()

    def _order(self, index: int) -> list[int]:
        """Return the numbers of a message's pieces, without the name of a tool that a result repeats (gpt-oss)."""
        order = self.places[index]
        once: dict[int, int] = {}
        for n in order:
            once.setdefault(id(self.pieces[n][0]), n)
        if len(once) == len(order):
            return order
        first, again = sorted(once.values()), [n for n in order if n not in once.values()]
        ends = self.pieces[first[-1]][2] if first else 0
        found = [self.pieces[n] for n in again]
        later = [piece.kind == "call" and self.stops.search(self.text, ends, begin) for piece, begin, _ in found]
        return first if all(later) else order

    def _start(self, first: int, role: str) -> int:
        """Return where the trained part of the message that begins with piece `first` starts."""
        text, (piece, start, _) = self.text, self.pieces[first]
        before = self.pieces[first - 1][2] if first else 0
        if role == "assistant" and self.prompt and (found := text.count(self.prompt, before, start)):
            if found > 1:
                raise Unplaced(
                    "the generation prompt is there more than once before a reply (behind an empty message?)"
                )
            return text.index(self.prompt, before, start) + len(self.prompt)
        if piece.kind != "content" or piece.lead is None:
            raise Unplaced(
                f"a message of role {role!r} begins with what the template writes, and the template's generation "
                "prompt is not in front of it, so where the reply begins cannot be told"
            )
        if not piece.lead or not text.endswith(piece.lead, before, start):
            if piece.lead.strip():
                raise Unplaced(
                    "the chat template rewrites the beginning of a reply, and has no generation prompt there"
                )
            return start
        if piece.lead.strip() or self._keeps_lead(piece):
            return start - len(piece.lead)
        return start

    def _keeps_lead(self, piece: Piece) -> bool:
        """Tell whether the whitespace before a reply is its own or the template's, by leaving it out."""
        messages = list(self.messages)
        content = messages[piece.message]["content"]
        if not isinstance(content, str):
            content = content[0].get("text", "") if len(content) == 1 else ""
        messages[piece.message] = messages[piece.message] | {"content": content.lstrip()}
        return self.plain(messages) != self.text
