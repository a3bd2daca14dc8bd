"""Prompts for a policy to answer: nothing of them is supervised, and their rows come along for the rewards."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import attrs
from attrs.validators import gt

from posttrain.batch import Batch, Extra
from posttrain.blocks.data.data import Data, anchor_of, pad_id
from posttrain.blocks.data.encoding.encoders import (
    NO_IMAGES,
    ChatEncoder,
    Encoded,
    Encoder,
    Token,
    Values,
    kept,
    readable,
    refuse_surrogates,
)
from posttrain.blocks.data.encoding.fingerprints import code_of, tokenizer_text
from posttrain.blocks.data.rows.chat import ChatRenderer, special_tokens
from posttrain.blocks.data.rows.media import COLUMNS, OTHERS, column_of, images_of
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.offsets import tokenize
from posttrain.blocks.data.rows.schemas import (
    CHATS,
    REPLIES,
    SHARED,
    Reading,
    Sample,
    Schema,
    conversation,
    filled,
    prompt_of,
)
from posttrain.blocks.data.rows.sight import bare
from posttrain.blocks.images.arrange import IMAGES, PICTURE
from posttrain.blocks.images.pixels import without_pixels
from posttrain.blocks.images.processor import images_of as processor_of
from posttrain.blocks.layout import Column, Columns, Example, collate
from posttrain.registry import block, key

ROW, MESSAGES, CONVERSATION = "row", "messages", "conversation"
CARRIED: Columns = {name: Column("example", "json") for name in (ROW, MESSAGES, CONVERSATION)}
"""What a prompt carries: the columns of its row, its messages (none for plain text), and what else it was rendered
with, such as tools."""


@block("data", "prompts")
class PromptData(Data):
    """Prompts, for methods in which the model itself says the replies: conversations, questions, or plain text.

    The columns of a row reach the rewards. A conversation that ends with a reply is asked without it.
    """

    policies: ClassVar[tuple[str, ...]] = ("drop",)
    takes_images: ClassVar[bool] = True

    max_length: int = key(2048, check=gt(1), also=("max_prompt_length",))
    """Tokens that a prompt may have."""
    overflow: Literal["error", "drop"] = "error"
    """What happens to a prompt that is longer: say so and stop, or leave it out."""
    packing: bool = False
    """Not for prompts: replies are packed, with the prompt of a group once."""
    text_column: str | None = None
    """Column that holds the prompt as plain text, which the model goes on with as it is: for base models and few
    examples. By default rows are conversations, rendered with the chat template."""
    template_args: dict[str, Any] = key(factory=dict, also=("chat_template_kwargs",))
    """More variables for the chat template (`enable_thinking`)."""
    keep: list[str] = attrs.field(factory=list)
    """Columns of the rows that rewards get to see; by default all of them."""
    tools: list[dict[str, Any]] = attrs.field(factory=list)
    """Tools, as JSON schemas, that the chat template is to list in every prompt besides those of its row. An
    environment adds its own."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself."""
        yield from super().check()
        if self.packing:
            yield "packing", "is not for prompts: replies are packed, with the prompt of a group once"
        if self.text_column is not None and self.template_args:
            yield "template_args", "has no use where text_column names prompts that are plain text"
        if self.text_column is not None and self.tools:
            yield "tools", "are listed by the chat template, which is not used where text_column names plain text"

    @property
    def columns(self) -> Columns:
        """What prompts carry."""
        return CARRIED

    def columns_of(self, tokenizer: Any) -> Columns:
        """Return what prompts carry for a tokenizer's model: also their images, but for plain text."""
        return super().columns_of(tokenizer) if self.text_column is None else self.columns

    def fullest(self, length: int) -> Example:
        """Return a prompt as long as can be."""
        return Example(super().fullest(length).documents, {ROW: {}, MESSAGES: [], CONVERSATION: {}})

    def collator(self, tokenizer: Any) -> Callable[[list[list[Example]], int], Batch]:
        """Return what makes a batch of prompts, with pictures in the spans of their images; its weight is their
        number."""
        columns, sight = self.columns_of(tokenizer), self.sight(tokenizer)
        read = sight.pictures.read if sight is not None and IMAGES in columns else None
        return partial(_collated, pad_id=pad_id(tokenizer), columns=columns, read=read)

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what renders and tokenizes prompts."""
        if self.text_column is not None:
            return PromptEncoder(tokenizer, None, self.text_column, self.keep)
        args, decides = self.template_args, json.dumps([self.keep, self.tools])
        if (sight := self.sight(tokenizer)) is None:
            return PromptEncoder(tokenizer, ChatRenderer(tokenizer, template_args=args), None, [], self.sample, decides)
        renderer = ChatRenderer(tokenizer, template_args=args, anchor=anchor_of(tokenizer))
        columns = self.columns_of(tokenizer)
        return ChatEncoder(renderer, self.sample, _schema, columns=columns, sight=sight, ask=True, decides=decides)

    def sample(self, row: dict[str, Any]) -> Sample:
        """Return what a row asks, and what comes along for the rewards: no pixels, but what tells images apart."""
        found = self.prompt(row)
        if self.tools:
            found = {**found, "tools": [*(found.get("tools") or []), *self.tools]}
        names = self.keep or [name for name, value in row.items() if filled(value)]
        more = {name: found[name] for name in ("tools", "template_args") if found.get(name)}
        messages = bare(found)["messages"]
        return Sample([found], {ROW: kept(without_pixels(row), names), MESSAGES: messages, CONVERSATION: more})

    def prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the conversation that a row asks; override it for a schema of your own."""
        return asked(row)


def _schema(row: Values) -> Schema:
    return Schema("prompts", tuple(row))


def _collated(
    rows: list[list[Example]], multiple: int = 1, *, pad_id: int, columns: Columns, read: Callable[[Values], Any] | None
) -> Batch:
    batch = collate(rows, multiple, pad_id=pad_id, columns=columns).but(weight=len(rows))
    if read is None:
        return batch
    spans = [[span | {PICTURE: read(span)} for span in each] for each in batch[IMAGES]]
    return batch.but(**{IMAGES: Extra(spans, "span")})


@attrs.define
class PromptEncoder:
    """Prompts without images as tokens, with their rows."""

    tokenizer: Any
    renderer: ChatRenderer | None
    """None for plain text."""
    text_column: str | None
    keep: list[str]
    """Of plain text."""
    sample: Callable[[Values], Sample] | None = None
    """Row -> the conversation to go on with, and what comes along."""
    decides: str = ""
    """What else decides what `sample` says."""
    sides: tuple[str, ...] = ("",)
    columns: Columns = CARRIED
    reading: Reading = attrs.field(factory=Reading)
    """Of the rows so far."""

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once."""
        import numpy as np

        told = [self._told(row) for row in rows]
        encodings = iter(tokenize(self.tokenizer, [one[0] for one in told if not isinstance(one, Refused)]))
        found: list[Encoded] = []
        for one in told:
            if isinstance(one, Refused):
                found.append(one)
                continue
            ids = np.array(next(encodings).ids, dtype=np.uint32)
            empty = Refused("the prompt is empty: there is nothing to go on with")
            found.append(Example(((ids, np.zeros(len(ids), dtype=bool)),), one[1]) if len(ids) else empty)
        return found

    def show(self, row: Values) -> list[list[Token]]:
        """Return a prompt's tokens as text."""
        told = self._told(row)
        if isinstance(told, Refused):
            raise told
        (encoding,) = tokenize(self.tokenizer, [told[0]])
        return [[(text, False, "prompt") for text in readable(encoding, told[0])]]

    def fingerprint(self) -> str:
        """Return everything that decides what a row becomes."""
        said: list[Any] = [self.text_column, self.keep, self.decides]
        if self.renderer is not None:
            said += [self.renderer.templates[True], self.renderer.templates[False], self.renderer.template_args]
        code = code_of(self.sample) if self.sample is not None else ""
        return "\0".join(["prompts 3", tokenizer_text(self.tokenizer), json.dumps(said), code])

    def _told(self, row: Values) -> tuple[str, Values] | Refused:
        """Return a row's prompt as text, and what comes along."""
        self.reading.note(row, _schema)
        try:
            text, values = self._text(row)
            refuse_surrogates(text)
            return text, values
        except Refused as refused:
            return refused

    def _text(self, row: Values) -> tuple[str, Values]:
        if self.renderer is None or self.sample is None:
            text = row.get(str(self.text_column))
            if not isinstance(text, str) or not text:
                raise Refused(f"the column {self.text_column!r} is missing, empty or not text")
            if processor_of(self.tokenizer) is not None and column_of(row) is not None:
                raise Refused("there are images, and plain text (data.text_column) has no place for them")
            names = self.keep or [name for name, value in row.items() if filled(value)]
            return text, {ROW: kept(row, names), MESSAGES: [], CONVERSATION: {}}
        sample = self.sample(row)
        (found,) = sample.conversations
        if any(map(images_of, found["messages"])):
            raise Refused(NO_IMAGES)
        text = self.renderer.asked_with_tools(found)
        said = [each["content"] for each in found["messages"] if isinstance(each.get("content"), str)]
        for control in special_tokens(self.tokenizer):
            if any(control in one for one in said):
                raise Refused(f"the text of a message holds the control token {control}")
        return text, sample.values


def asked(row: Values) -> Values:
    """Return the conversation that a row of any recognised schema asks the model to go on with.

    Raises:
        Refused: there is no prompt in it.
    """
    if not any(filled(row.get(name)) for name in CHATS):
        ask = next((name for name in REPLIES if filled(row.get(name))), None)
        if ask is None:
            known = ", ".join([*CHATS[:2], *REPLIES])
            raise Refused(
                f"columns {', '.join(map(repr, row)) or '(none)'} hold no prompt (known: {known}); say which is which "
                "with `columns` on the source, or name one of plain text with data.text_column"
            )
        beside = (*SHARED, *COLUMNS, *OTHERS)
        row = {name: row[name] for name in beside if name in row} | {CHATS[0]: prompt_of(row, ask)}
    found = conversation(row)
    messages = list(found["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] in ("system", "developer"):
        raise Refused("the conversation holds no question: there is nothing to answer")
    return {**found, "messages": messages}
