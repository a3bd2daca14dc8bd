"""Prompts for a policy to answer: nothing of them is supervised, and their rows come along for the rewards."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import attrs
from attrs.validators import gt

from posttrain.batch import Batch
from posttrain.blocks.data.data import Data, pad_id
from posttrain.blocks.data.encoding.encoders import (
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
from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.offsets import tokenize
from posttrain.blocks.data.rows.schemas import CHATS, REPLIES, SHARED, Reading, Schema, conversation, filled, prompt_of
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

    def fullest(self, length: int) -> Example:
        """Return a prompt as long as can be."""
        return Example(super().fullest(length).documents, {ROW: {}, MESSAGES: [], CONVERSATION: {}})

    def collator(self, tokenizer: Any) -> Callable[[list[list[Example]], int], Batch]:
        """Return what makes a batch of prompts; its weight is their number."""
        return partial(_collated, pad_id=pad_id(tokenizer))

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what renders and tokenizes prompts."""
        renderer = None if self.text_column is not None else ChatRenderer(tokenizer, template_args=self.template_args)
        return PromptEncoder(tokenizer, renderer, self.text_column, self.keep, self.prompt, self.tools)

    def prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the conversation that a row asks; override it for a schema of your own."""
        return asked(row)


def _collated(rows: list[list[Example]], multiple: int, *, pad_id: int) -> Batch:
    return collate(rows, multiple, pad_id=pad_id, columns=CARRIED).but(weight=len(rows))


@attrs.define
class PromptEncoder:
    """Prompts as tokens, with their rows."""

    tokenizer: Any
    renderer: ChatRenderer | None
    """None for plain text."""
    text_column: str | None
    keep: list[str]
    prompt: Callable[[Values], Values]
    """Row -> the conversation to go on with."""
    tools: list[dict[str, Any]] = attrs.field(factory=list)
    """Of every prompt, besides those of its row."""
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
            values = {ROW: one[1], MESSAGES: one[2].pop("messages"), CONVERSATION: one[2]}
            empty = Refused("the prompt is empty: there is nothing to go on with")
            found.append(Example(((ids, np.zeros(len(ids), dtype=bool)),), values) if len(ids) else empty)
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
        said: list[Any] = [self.text_column, self.keep, self.tools]
        if self.renderer is not None:
            said += [self.renderer.templates[True], self.renderer.templates[False], self.renderer.template_args]
        return "\0".join(["prompts 2", tokenizer_text(self.tokenizer), json.dumps(said), code_of(self.prompt)])

    def _told(self, row: Values) -> tuple[str, Values, dict[str, Any]] | Refused:
        """Return a row's prompt as text, the columns that come along, and the conversation."""
        self.reading.note(row, lambda _: Schema("prompts", tuple(row)))
        try:
            text, conversation = self._text(row)
            refuse_surrogates(text)
            names = self.keep or [name for name, value in row.items() if filled(value)]
            return text, kept(row, names), conversation
        except Refused as refused:
            return refused

    def _text(self, row: Values) -> tuple[str, dict[str, Any]]:
        if self.renderer is None:
            text = row.get(str(self.text_column))
            if not isinstance(text, str) or not text:
                raise Refused(f"the column {self.text_column!r} is missing, empty or not text")
            return text, {"messages": []}
        found = self.prompt(row)
        if self.tools:
            found = {**found, "tools": [*(found.get("tools") or []), *self.tools]}
        if any(map(images_of, found["messages"])):
            raise Refused("there are images, and replies to them cannot be sampled yet")
        text = self.renderer.asked(found)
        if found.get("tools") and self.renderer.asked({**found, "tools": None}) == text:
            raise Refused("the chat template leaves out the tools; say in a system message what there is")
        said = [each["content"] for each in found["messages"] if isinstance(each.get("content"), str)]
        for control in special_tokens(self.tokenizer):
            if any(control in one for one in said):
                raise Refused(f"the text of a message holds the control token {control}")
        known = ("messages", "tools", "template_args")
        return text, {name: found[name] for name in known if found.get(name)}


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
        row = {name: row[name] for name in SHARED if name in row} | {CHATS[0]: prompt_of(row, ask)}
    found = conversation(row)
    messages = list(found["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] in ("system", "developer"):
        raise Refused("the conversation holds no question: there is nothing to answer")
    return {**found, "messages": messages}
