"""The images of conversations: what they are, how many tokens each becomes, and where these are in a document.

A chat template writes one placeholder for each image, and the processor says what becomes of it. Only what the template
has written counts as one: the markers around the texts of messages say so.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.data.readers import Reader
from posttrain.blocks.data.rows.chat import Rendered
from posttrain.blocks.data.rows.literal import Literal
from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.data.rows.offsets import token_at
from posttrain.blocks.data.rows.refused import Refused
from posttrain.blocks.data.rows.schemas import Sample
from posttrain.blocks.data.sources import Told
from posttrain.blocks.images.pixels import Pictures, Unreadable
from posttrain.words import counted

if TYPE_CHECKING:
    import numpy as np

THREADS = min(8, os.cpu_count() or 1)
"""That read images while rows are tokenized."""
Values = dict[str, Any]


class Box(str):
    """What stands for the tokens of an image where people look at tokens."""

    tokens: int


@attrs.define(slots=False)
class Sight:
    """What a data block knows of images."""

    pictures: Pictures
    tokenizer: Any
    root: Path | None = None
    """Where relative paths begin; None for beside the file that names them."""

    @cached_property
    def literal(self) -> Literal:
        """Tokenizes control tokens that are meant literally."""
        return Literal(self.tokenizer)

    @cached_property
    def controls(self) -> set[str]:
        """Control tokens that belong to images."""
        return self.pictures.processor.controls

    def is_literal(self, control: str) -> bool:
        """Whether a control token in the text of a message is one that people write, and that can stay text."""
        return control in self.controls and self.literal.works

    def fingerprint(self) -> str:
        """Return what decides what an image becomes."""
        root = self.root and self.root.absolute()
        return f"{self.pictures.processor.fingerprint()} {self.pictures.megapixels} {root}"

    def look(self, said: list[tuple[list[Values], Values]]) -> None:
        """Note of every image of some conversations what is stored of it, or why it is refused; threads share the work.

        Args:
            said: conversations, whose images are numbered, each list with the row that it is from.
        """
        found = {
            id(part): (part, row)
            for conversations, row in said
            for one in conversations
            for each in one["messages"]
            for part in images_of(each)
        }
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda given: self._look(*given), found.values()):
                pass

    def _look(self, part: Values, row: Values) -> None:
        origin = row.origin if isinstance(row, Told) else None
        root = self.root or (origin.source.folder if origin else Path())
        try:
            part["seen"] = self.pictures.look(part["image"], root)
        except Unreadable as error:
            part["seen"] = Refused(str(error), error.detail)
            return
        if "path" in part["seen"] or "url" in part["seen"]:
            return
        if origin is None or origin.source.stream:  # it will not be read again
            part["seen"] |= {"image": part["image"]}
        else:
            part["seen"] |= {"at_row": origin.at, "part": part["number"]}

    def expanded(self, found: Rendered, images: list[Values], special: "re.Pattern[str] | None") -> Rendered:
        """Return a rendered conversation with what becomes of the placeholders of its images.

        Args:
            found: with a placeholder for each image.
            images: in the order of the messages.
            special: finds control tokens, if a message holds the text of one.

        Raises:
            Refused: one of the images is.
        """
        for part in images:
            if isinstance(part["seen"], Refused):
                raise part["seen"]
        texts = [self.pictures.processor.expansion(tuple(part["seen"]["size"])).text for part in images]
        grown = [(end, len(text) - (end - start)) for (start, end), text in zip(found.anchors, texts, strict=True)]

        def moved(at: int) -> int:
            return at + sum(more for end, more in grown if end <= at)

        parts, at, areas = list[str](), 0, []
        for (start, end), text, part in zip(found.anchors, texts, images, strict=True):
            areas.append((moved(start), moved(start) + len(text), part["seen"]))
            parts, at = [*parts, found.text[at:start], text], end
        text = "".join([*parts, found.text[at:]])
        pieces = [(piece, moved(start), moved(end)) for piece, start, end in found.pieces]
        controls = None
        if special is not None:
            every = (match.span() for match in special.finditer(text))
            controls = [(a, b) for a, b in every if not any(start < b and a < end for _, start, end in pieces)]
        return Rendered(
            text=text, pieces=pieces, spans=[(moved(a), moved(b)) for a, b in found.spans],
            turns=[(moved(a), role) for a, role in found.turns], anchors=found.anchors, images=areas, controls=controls,
        )  # fmt: skip

    def spans(self, side: Rendered, encoding: Any, ids: "np.ndarray") -> list[Values]:
        """Return where the images of a document are among its tokens, and what is stored of them."""
        found = []
        for start, end, seen in side.images:
            first = token_at(encoding, range(start, end))
            last = token_at(encoding, range(end - 1, start - 1, -1))
            assert first is not None and last is not None, "the placeholder of an image has no token"
            here = ids[first : last + 1]
            if int((here == self.pictures.processor.token_id).sum()) != seen["tokens"]:
                raise Refused("the tokenizer merges the tokens of an image with others")
            found.append({"at": first, "length": len(here), **seen})
        return found


@attrs.define(eq=False)
class InRow:
    """Finds images that lie in rows."""

    sample: Callable[[Values], Sample]
    """Row -> its conversations."""
    readers: dict[str, Reader] = attrs.field(factory=dict)

    def __call__(self, span: Values) -> Any:
        """Return what a row says of an image, from what was stored of it."""
        if "image" in span:  # of a stream, whose rows cannot be read again
            return span["image"]
        source, (conversation, number) = span["source"], span["part"]
        name = source.label
        if name not in self.readers:
            self.readers[name] = source.open()
        found = numbered(self.sample(source.row(self.readers[name], span["at_row"])).conversations)[conversation]
        parts = (part for each in found["messages"] for part in images_of(each))
        return next(part["image"] for part in parts if part["number"] == [conversation, number])


def numbered(conversations: list[Values]) -> list[Values]:
    """Return conversations whose images have numbers: of the conversation in its row, and of the image in it."""
    found = []
    for n, one in enumerate(conversations):
        count, messages = 0, []
        for each in one["messages"]:
            content = each.get("content")
            if images_of(each):
                parts = []
                for part in content:
                    image = part.get("type") == "image"
                    parts.append(part | {"number": [n, count]} if image else part)
                    count += image
                each = each | {"content": parts}
            messages.append(each)
        found.append(one | {"messages": messages})
    return found


def bare(conversation: Values) -> Values:
    """Return a conversation whose image parts say no more than that they are one: no template needs the image."""
    messages = []
    for each in conversation["messages"]:
        if images_of(each):
            parts = [{"type": "image"} if part.get("type") == "image" else part for part in each["content"]]
            each = each | {"content": parts}
        messages.append(each)
    return conversation | {"messages": messages}


def boxed(tokens: list[Any], spans: list[Values]) -> list[Any]:
    """Return tokens to look at, with one box for all tokens of an image."""
    found, at = [], 0
    for span in spans:
        found += tokens[at : span["at"]]
        name = Path(span["path"]).name if "path" in span else span.get("url", "in the row")
        box = Box(f"[image {span['size'][0]}x{span['size'][1]}, {counted(span['tokens'], 'token')}, {name}]")
        box.tokens = span["length"]
        found.append((box, False, tokens[span["at"]][2]))
        at = span["at"] + span["length"]
    return found + tokens[at:]
