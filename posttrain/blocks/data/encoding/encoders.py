"""Rows -> token ids, and which of them are supervised. Text is tokenized here and nowhere else."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, TypeAlias

import attrs

from posttrain.blocks.data.encoding.fingerprints import code_of, hash_of, tokenizer_text
from posttrain.blocks.data.rows.chat import ChatRenderer, Rendered, special_tokens
from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.offsets import supervised, tokenize
from posttrain.blocks.data.rows.schemas import Reading, Sample, Schema
from posttrain.blocks.data.rows.sight import Sight, bare, boxed, numbered
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.layout import Columns, Document, Example

ACCESS = re.compile(r"""(?:\.|\[["']|get\(["'])(\w+)""")
"""How a template takes a key of a message: `m.name`, `m['name']`, `m.get('name')`."""
NO_IMAGES = (
    "there are images, and the model sees none, or its processor cannot be used, or this kind of data takes none"
)
Values: TypeAlias = dict[str, Any]
Encoded: TypeAlias = Example | Refused
"""What the row became, or why it cannot be trained on."""
Token: TypeAlias = tuple[str, bool, str]
"""Text, supervised, role: for showing."""


class Encoder(Protocol):
    """Turns rows into examples."""

    @property
    def sides(self) -> tuple[str, ...]:
        """What the documents of an example are called; a single one needs no name."""

    @property
    def columns(self) -> Columns:
        """The values that examples carry beside their tokens."""

    @property
    def reading(self) -> Reading:
        """Which columns of the rows were read so far, and which were not."""

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once; `apart` gives the examples of one that became several."""

    def show(self, row: Values) -> list[list[Token]]:
        """Return the tokens of a row's documents for a person to look at; raises Refused as `encode` returns it."""

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""


@attrs.define
class ChatEncoder:
    """Conversations, rendered with a chat template; the trained spans of the text become supervised tokens."""

    renderer: ChatRenderer
    sample: Callable[[Values], Sample]
    """Row -> its conversations."""
    schema: Callable[[Values], Schema] | None = None
    """Row -> which of its columns `sample` reads, if that is known."""
    sides: tuple[str, ...] = ("",)
    """What the documents of an example are called."""
    columns: Columns = attrs.field(factory=dict)
    """What examples carry: what `sample` gives, and otherwise columns of the row."""
    reading: Reading = attrs.field(factory=Reading)
    """Of the rows so far."""
    sight: Sight | None = None
    """What knows the images of rows, for a model that sees any."""
    ask: bool = False
    """Whether the model is to go on with the conversations, so that nothing of them is supervised."""
    decides: str = ""
    """What else decides what `sample` says."""
    special: re.Pattern[str] = attrs.field(init=False)
    """The tokenizer's control tokens."""

    def __attrs_post_init__(self) -> None:
        tokens = sorted(special_tokens(self.renderer.tokenizer), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        words = {word for template in self.renderer.templates.values() for word in ACCESS.findall(template)}
        self.reading.keys |= words

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once; the tokenizer's own threads share the work."""
        said = [self._said(row) for row in rows]
        if self.sight is not None:
            self.sight.look([(one[0], row) for one, row in zip(said, rows, strict=True) if isinstance(one, tuple)])
        rendered = [self._rendered(found) for found in said]
        good = [side for found in rendered if not isinstance(found, Refused) for side in found[0]]
        encodings = iter(self._tokenized(good))
        found: list[Encoded] = []
        for row in rendered:
            found.append(row if isinstance(row, Refused) else self._encoded(*row, list(islice(encodings, len(row[0])))))
        return found

    def show(self, row: Values) -> list[list[Token]]:
        """Return the tokens of a row as text, with the role of the message that each belongs to."""
        said = self._said(row)
        if self.sight is not None and not isinstance(said, Refused):
            self.sight.look([(said[0], row)])
        found = self._rendered(said)
        if isinstance(found, Refused):
            raise found
        sides, values = found
        encodings = self._tokenized(sides)
        encoded = self._encoded(sides, values, encodings)
        if isinstance(encoded, Refused):
            raise encoded
        shown = []
        for n, (side, encoding, (_, mask)) in enumerate(zip(sides, encodings, encoded.documents, strict=True)):
            roles = [next((role for end, role in side.turns if at < end), "") for at, _ in encoding.offsets]
            tokens = list(zip(readable(encoding, side.text), mask.tolist(), roles, strict=True))
            shown.append(boxed(tokens, encoded.values.get(IMAGES, ((),) * len(sides))[n]))
        return shown

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""
        renderer = self.renderer
        said = [
            renderer.templates[True], renderer.templates[False], sorted(renderer.train_on), renderer.template_args,
            renderer.last_turn_only, renderer.split_turns, *(["no empty thoughts"] * renderer.ignore_empty_think),
        ]  # fmt: skip
        seen = [] if self.sight is None else [self.sight.fingerprint()]
        seen += [f"asked {self.decides}"] if self.ask else []
        return hash_of(
            tokenizer_text(renderer.tokenizer), json.dumps(said, default=str), *self.sides, code_of(self.sample), *seen
        )

    def _said(self, row: Values) -> tuple[list[Values], Values] | Refused:
        """Return the conversations of a row, and the values that go along."""
        self.reading.note(row, self.schema, self.columns)
        try:
            sample = self.sample(row)
            values = sample.values | kept(row, self.columns.keys() - sample.values.keys() - {IMAGES})
            conversations = sample.conversations if self.sight is None else numbered(sample.conversations)
            return [turn for one in conversations for turn in self.renderer.documents(one)], values
        except Refused as refused:
            return refused

    def _rendered(self, said: tuple[list[Values], Values] | Refused) -> tuple[list[Rendered], Values] | Refused:
        if isinstance(said, Refused):
            return said
        try:
            return [self._render(conversation) for conversation in said[0]], said[1]
        except Refused as refused:
            return refused

    def _render(self, conversation: Values) -> Rendered:
        images = [part for each in conversation["messages"] for part in images_of(each)]
        if images and self.sight is None:
            raise Refused(NO_IMAGES)
        found = self.renderer.render(bare(conversation) if images else conversation, self.ask)
        refuse_surrogates(found.text)
        literal = False
        for _, start, end in found.pieces:
            for control in self.special.finditer(found.text, start, end):
                if self.sight is None or not self.sight.is_literal(control.group()):
                    raise Refused(f"the text of a message holds the control token {control.group()}")
                literal = True
        if self.sight is not None:
            found = self.sight.expanded(found, images, self.special if literal else None)
        return found

    def _tokenized(self, sides: list[Rendered]) -> list[Any]:
        found = tokenize(self.renderer.tokenizer, [side.text for side in sides])
        if self.sight is None:
            return found
        return [self.sight.literal.encode(side.text, side.controls) if side.controls is not None else plain
                for side, plain in zip(sides, found, strict=True)]  # fmt: skip

    def _encoded(self, sides: list[Rendered], values: Values, encodings: list[Any]) -> Encoded:
        import numpy as np

        documents: list[Document] = []
        spans: list[list[Values]] = []
        for side, encoding in zip(sides, encodings, strict=True):
            mask, ids = supervised(encoding, side.spans), np.array(encoding.ids, dtype=np.uint32)
            if self.sight is not None:
                try:
                    spans.append(self.sight.spans(side, encoding, ids))
                except Refused as refused:
                    return refused
                for span in spans[-1]:  # nobody says a placeholder
                    mask[span["at"] : span["at"] + span["length"]] = False
            if not self.ask and not mask[1:].any():
                return Refused("no token of it would be supervised")
            documents.append((ids, mask))
        if self.sight is not None:
            values = values | {IMAGES: tuple(spans)}
        example = Example(tuple(documents), values)
        if len(self.sides) > 1 and example.alike(self.columns):
            return Refused(f"{' and '.join(self.sides)} are equal")
        return example


@attrs.define
class TextEncoder:
    """Plain documents, every token of which is supervised."""

    tokenizer: Any
    column: str
    bos: bool
    eos: bool
    sides: tuple[str, ...] = ("",)
    columns: Columns = attrs.field(factory=dict)
    """Columns of the row that examples carry."""
    reading: Reading = attrs.field(factory=Reading)
    """Of the rows so far."""

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once."""
        import numpy as np

        for row in rows:
            self.reading.note(row, lambda _: Schema(self.column, (self.column,)), self.columns)

        texts = [self._text(row) for row in rows]
        encodings = iter(tokenize(self.tokenizer, [text for text in texts if isinstance(text, str)]))
        found: list[Encoded] = []
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, Refused):
                found.append(text)
                continue
            ids = [*self._bos(), *next(encodings).ids, *self._eos()]
            mask = np.ones(len(ids), dtype=bool)
            document = np.array(ids, dtype=np.uint32), mask
            values = kept(row, self.columns)
            found.append(Example((document,), values) if len(ids) > 1 else Refused("it is a single token"))
        return found

    def show(self, row: Values) -> list[list[Token]]:
        """Return a row's tokens as text."""
        (encoded,) = self.encode([row])
        if isinstance(encoded, Refused):
            raise encoded
        ((ids, _),) = encoded.documents
        return [[(self.tokenizer.decode([i]), n > 0, "text") for n, i in enumerate(ids.tolist())]]

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""
        return hash_of(tokenizer_text(self.tokenizer), repr([self.column, self.bos, self.eos]))

    def _text(self, row: Values) -> str | Refused:
        text = row.get(self.column)
        if not isinstance(text, str) or not text:
            return Refused(f"the column {self.column!r} is missing, empty or not text")
        try:
            refuse_surrogates(text)
            kept(row, self.columns)
        except Refused as refused:
            return refused
        return text

    def _bos(self) -> list[int]:
        return [self.tokenizer.bos_token_id] if self.bos else []

    def _eos(self) -> list[int]:
        return [self.tokenizer.eos_token_id] if self.eos else []


def kept(row: Values, names: Iterable[str]) -> Values:
    """Return the columns of a row that go along with it.

    Raises:
        Refused: there is no such column, or it holds more than plain data.
    """
    for name in names:
        if name not in row:
            raise Refused(f"the column {name!r} that data.keep names is missing")
        try:
            json.dumps(row[name])
        except (TypeError, ValueError):
            raise Refused(f"the column {name!r} that data.keep names holds more than plain JSON data") from None
    return {name: row[name] for name in names}


def apart(example: Example, sides: tuple[str, ...], columns: Columns) -> list[Example]:
    """Return the examples that a row became: its documents one by one, if they are not the sides of a whole."""
    if len(sides) > 1 or len(example.documents) == 1:
        return [example]
    found = []
    for n, document in enumerate(example.documents):
        values = {k: x if columns[k].per == "example" else (x[n],) for k, x in example.values.items()}
        found.append(Example((document,), values))
    return found


def refuse_surrogates(text: str) -> None:
    """Refuse text that no encoding can write; one such row would fail the whole batch.

    Raises:
        Refused: it holds half of a UTF-16 surrogate pair.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused("the text holds half of a UTF-16 surrogate pair") from None


def readable(encoding: Any, text: str) -> Iterator[str]:
    """Yield the text of each token; the bytes of a character that several tokens share go to the first of them."""
    shown = 0
    for start, end in encoding.offsets:
        yield text[max(start, shown) : end]
        shown = max(shown, end)
