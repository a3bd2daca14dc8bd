"""Conversations -> text with the model's own chat template, and the exact spans of it that are trained.

Markers (private-use characters) are put around every string of the conversation, the whole conversation is rendered
once plain and once marked, and the markers say where each message ended up. So a template may rewrite history,
fold, trim, rename and reorder, and a reply may repeat what was said before: nothing is searched for in the text.
Without the markers the second rendering must be the first, to the letter; otherwise the row is refused.
"""

import re
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from typing import Any

import attrs

from posttrain.blocks.data.rows.markers import END, START, Marker, Piece, without_markers
from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.data.rows.messages import (
    REASONING,
    Ranges,
    Refused,
    Unplaced,
    Unrendered,
    mark,
    text_of,
    unmarked,
    variants,
)
from posttrain.blocks.data.rows.spans import Layout
from posttrain.errors import DataError
from posttrain.words import counted

THOUGHTS = frozenset(REASONING)
NO_THOUGHT = re.compile(r"\s*(?:<think>\s*)?</think>\s*")
"""Where the prompt opens the thinking, the reply only closes it."""
TAG = re.compile(r"</?[A-Za-z_]\w*>")
STOPS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|call|>", "</s>",
    "<|endoftext|>", "<|end▁of▁sentence|>", "<|end_of_text|>", "<|eot|>", "<turn|>", "[e~[",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
)  # fmt: skip
"""Tokens that end a turn in the templates in use; they count where the tokenizer has them as special tokens."""
TODAY = datetime(2024, 7, 26)
"""What `strftime_now` says in templates that print the date: the day that Llama 3 falls back to. A real clock would
make the data differ from day to day; `template_args: {date_string: ...}` sets another one."""


@attrs.frozen
class Rendered:
    """A conversation as text, with the places of what came from the messages (in characters)."""

    text: str
    pieces: list[tuple[Piece, int, int]]
    """Each with its start and end, in the order of the text."""
    spans: list[tuple[int, int]]
    """What is trained."""
    turns: list[tuple[int, str]]
    """End and role of each message found, in the order of the text."""
    anchors: list[tuple[int, int]] = attrs.field(factory=list)
    """Where images stand; a text of a message that looks alike is none of them."""
    images: list[tuple[int, int, dict[str, Any]]] = attrs.field(factory=list)
    """Start and end of what became of each of them, and what is stored of it."""
    controls: list[tuple[int, int]] | None = None
    """Where the template's own control tokens are, if a message holds the text of one."""


@attrs.define
class ChatRenderer:
    """Renders conversations for one tokenizer. Can be pickled: worker processes get a copy."""

    tokenizer: Any
    """A fast tokenizer of transformers."""
    train_on: Collection[str] = ("assistant",)
    """Roles of the messages that are trained."""
    template_args: dict[str, Any] = attrs.field(factory=dict)
    """More variables for the template (`enable_thinking`)."""
    last_turn_only: bool = False
    """Train nothing in front of the last message of a user."""
    split_turns: bool = False
    """Make a document of each turn (see `documents`)."""
    anchor: str | None = None
    """What the template writes where an image stands; None if the model sees none."""
    ignore_empty_think: bool = False
    """Leave `<think></think>` at the beginning of a reply untrained, if nothing stands in it."""
    templates: dict[bool, str] = attrs.field(init=False)
    """Jinja text for conversations without and with tools; the same for most tokenizers."""
    stops: re.Pattern[str] = attrs.field(init=False)
    tags: re.Pattern[str] | None = attrs.field(init=False)
    prompt: str = attrs.field(init=False)
    """What asks the model for a reply: the text that `add_generation_prompt` adds; may be empty."""

    def __attrs_post_init__(self) -> None:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template; set `tokenizer.chat_template` to a name "
                "(chatml, llama3, zephyr, plain), to a .jinja file, or to Jinja text"
            )
        self.templates = {with_tools: self._template(with_tools) for with_tools in (False, True)}
        special = set(special_tokens(self.tokenizer))
        self.stops = re.compile("|".join(map(re.escape, sorted(stop_tokens(self.tokenizer), key=len, reverse=True))))
        mentioned = {tag for text in self.templates.values() for tag in TAG.findall(text)} - special - {self.anchor}
        self.tags = re.compile("(" + "|".join(map(re.escape, sorted(mentioned))) + ")") if mentioned else None
        self.prompt = self._generation_prompt()

    def documents(self, conversation: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the conversations that a conversation is trained as: itself, or with `split_turns` one for each turn.

        Each of these ends with its turn, which alone is trained. So the turn is trained as it was generated, also
        where the template rewrites what came before it (reasoning models forget what they thought in earlier turns).
        Turns of which nothing is trained give none.
        """
        if not self.split_turns:
            return [conversation]
        messages, first = conversation["messages"], conversation.get("shared", 0)
        asks = [n for n, each in enumerate(messages) if each["role"] == "user" and n >= first]
        begins = [n for n in asks if n == 0 or messages[n - 1]["role"] != "user"]
        ends = [*(n for n in begins[1:]), len(messages)]
        turns = [
            conversation | {"messages": messages[:end], "shared": begin}
            for begin, end in zip([first, *begins[1:]], ends, strict=True)
        ]
        return [turn for turn in turns if self._trained(turn)] or [conversation]

    def render(self, conversation: dict[str, Any], ask: bool = False) -> Rendered:
        """Return the text of a conversation and its trained spans.

        Args:
            conversation: `messages`, and perhaps `tools`, `template_args`, and `shared`: how many messages at its
                beginning are not trained, whatever their role.
            ask: whether the model is to go on with it: what asks for a reply stands at its end, and nothing is trained.

        Raises:
            Refused: the template refuses it or leaves something out, or the spans cannot be told for certain.
        """
        refused: list[Refused] = []
        trained = None if ask else self._trained(conversation)
        for messages in variants([unmarked(each) for each in conversation["messages"]]):
            try:
                return self._rendered(conversation | {"messages": messages}, trained)
            except Refused as reason:
                refused.append(reason)
        # An unplaced one had all of the text, in its spelling.
        said: list[Refused] = [reason for reason in refused if isinstance(reason, Unplaced)]
        if any(each.get("content") is None for each in conversation["messages"]):  # some fail on that alone
            said += [reason for reason in refused if not isinstance(reason, Unrendered)]
        raise (said or refused)[0]

    def asked(self, conversation: dict[str, Any]) -> str:
        """Return the text of a conversation that the model is to go on with: what asks for a reply stands at its end.

        Raises:
            Refused: the template refuses it.
        """
        others = variants([unmarked(each) for each in conversation["messages"]])
        first = next(others)
        text = self._plain(first, conversation, ask=True)
        *before, last = first
        said = text_of(last.get("content")).strip()
        if said in text or text != self._plain([*before, last | {"content": ""}], conversation, ask=True):
            return text
        for messages in others:  # the template loses text that stands alone: it goes through parts, or knows none
            with suppress(Refused):
                if said in (found := self._plain(messages, conversation, ask=True)):
                    return found
        raise Refused("the chat template leaves out the last message")

    def asked_with_tools(self, conversation: dict[str, Any]) -> str:
        """Return what `asked` does.

        Raises:
            Refused: the template refuses it, or leaves out the tools that there are.
        """
        text = self.asked(conversation)
        if conversation.get("tools") and self.asked({**conversation, "tools": None}) == text:
            raise Refused("the chat template leaves out the tools; say in a system message what there is")
        return text

    def _trained(self, conversation: dict[str, Any]) -> dict[int, bool | Ranges]:
        """Return the numbers of the messages that are trained, each with True or with the characters that are."""
        messages = conversation["messages"]
        asks = [n for n, each in enumerate(messages) if each["role"] == "user"]
        begin = max(conversation.get("shared", 0), asks[-1] if asks and self.last_turn_only else 0)
        said = [(n, mark(each), each["role"] in self.train_on) for n, each in enumerate(messages)]
        return {n: mine or role for n, mine, role in said if n >= begin and (role if mine is None else mine)}

    def _rendered(self, conversation: dict[str, Any], trained: dict[int, bool | Ranges] | None) -> Rendered:
        """Render a conversation; one of which nothing is trained (None) with what asks for a reply."""
        messages, ask = conversation["messages"], trained is None
        trained = trained or {}
        text = self._plain(messages, conversation, ask)
        if START in text or END in text:
            raise Refused("the text holds U+E000 or U+E001, which posttrain uses as markers")
        marker = Marker(self.tags)
        marked = marker.conversation(messages)
        found, pieces = without_markers(self._plain(marked, conversation, ask), marker.pieces)
        if found != text:
            raise Refused(
                "the chat template changes or inspects the text of the messages (with markers around it, it renders "
                "something else), so that the trained part cannot be told for certain"
            )
        layout = Layout(messages, text, pieces, self.stops, self.prompt, lambda rest: self._plain(rest, conversation))
        layout.refuse_left_out(marker.pieces, trained)
        spans = [span for index, characters in trained.items() for span in layout.spans(index, characters)]
        if self.ignore_empty_think:
            found_empty = [NO_THOUGHT.match(text, start, end) for start, end in spans]
            spans = [(empty.end() if empty else start, end)
                     for (start, end), empty in zip(spans, found_empty, strict=True)]  # fmt: skip
        if conversation.get("tools") and self._plain(messages, conversation, ask, hidden=True) == text:
            raise Refused("the chat template leaves out the tools that the conversation may use")
        if not spans and not ask:
            raise Refused(self._nothing(messages))
        return Rendered(text, pieces, spans, layout.turns(), self._anchors(text, pieces, messages))

    def _anchors(
        self, text: str, pieces: list[tuple[Piece, int, int]], messages: list[dict[str, Any]]
    ) -> list[tuple[int, int]]:
        """Return where the template itself has written that an image stands.

        Raises:
            Refused: there are more or fewer such places than images.
        """
        if self.anchor is None:
            return []
        places = [found.span() for found in re.finditer(re.escape(self.anchor), text)]
        own = [(a, b) for a, b in places if not any(start < b and a < end for _, start, end in pieces)]
        if len(own) != (count := sum(len(images_of(each)) for each in messages)):
            raise Refused(f"the chat template writes {self.anchor} {len(own)} times for {counted(count, 'image')}")
        return own

    def _nothing(self, messages: list[dict[str, Any]]) -> str:
        """Say why no message is trained."""
        if any(each["role"] in self.train_on for each in messages):
            return "every reply says that it is not trained (weight: 0, train: false), or stands before the last turn"
        return f"no message has a trained role ({', '.join(self.train_on)}), so nothing would be learned"

    def _template(self, with_tools: bool) -> str:
        try:
            return str(self.tokenizer.get_chat_template(tools=[{}] if with_tools else None))
        except ValueError as error:  # several templates, none of them the default
            raise DataError(f"the tokenizer's chat template cannot be chosen: {error}") from None

    def _plain(
        self, messages: list[dict[str, Any]], conversation: dict[str, Any], ask: bool = False, hidden: bool = False
    ) -> str:
        """Render as `apply_chat_template(tokenize=False)` does, without its checks per call; perhaps hide the tools."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        tools = conversation.get("tools")
        try:
            template = _compile_jinja_template(self.templates[bool(tools)])
            rendered = template.render(
                messages=[_aliased(message) for message in messages], tools=None if hidden else tools, documents=None,
                add_generation_prompt=ask, strftime_now=TODAY.strftime,
                **{**self.tokenizer.special_tokens_map, **self.template_args, **conversation.get("template_args", {})},
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise Unrendered(f"the chat template refuses the conversation: {error}") from None
        return str(rendered)

    def _generation_prompt(self) -> str:
        sample = [{"role": "user", "content": "x"}]
        try:
            with_prompt, without = self._plain(sample, {}, ask=True), self._plain(sample, {})
        except Refused:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""


def stop_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that may end a turn: eos, those of a generation_config.json, and well-known special ones."""
    import json
    from pathlib import Path

    stops = {token for token in STOPS if token in set(tokenizer.all_special_tokens) | set(special_tokens(tokenizer))}
    if tokenizer.eos_token:
        stops.add(tokenizer.eos_token)
    config = Path(tokenizer.name_or_path) / "generation_config.json"
    if config.is_file():
        said = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        ids = said if isinstance(said, list) else [said]
        stops |= {tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None}
    if not stops:
        raise DataError(
            "the tokenizer has no eos token and none that ends a turn, so the model could not learn to stop"
        )
    return stops


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the control tokens of a tokenizer with their ids."""
    return {str(t.content): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has the names that templates read, as transformers gives it to them."""
    if THOUGHTS.isdisjoint(message):
        return message
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
