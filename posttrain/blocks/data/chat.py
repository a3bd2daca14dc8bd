"""Conversations -> text with the model's own chat template, and the exact spans of it that are trained.

Markers (private-use characters) are put around every string of the conversation, the whole conversation is rendered
once plain and once marked, and the markers say where each message ended up. So a template may rewrite history,
fold, trim, rename and reorder, and a reply may repeat what was said before: nothing is searched for in the text.
Without the markers the second rendering must be the first, to the letter; otherwise the row is refused.
"""

import re
from collections.abc import Collection
from datetime import datetime
from typing import Any

import attrs

from posttrain.blocks.data.schemas import Refused
from posttrain.errors import DataError

START, END = "\ue000", "\ue001"
MARK = re.compile("([\ue000\ue001])([\ue100-\ue4ff])([\ue500-\ue8ff])")
TAG = re.compile(r"</?[A-Za-z_]\w*>")
REASONING = ("reasoning_content", "thinking", "reasoning")
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
class Piece:
    """A marked string, or part of one."""

    message: int
    lead: str | None
    """What the string holds before this piece, if it is its first; None for later ones."""
    kind: str
    """`content`, `reasoning` or `call`."""


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
            marked["content"] = [p | {"text": self._text(p["text"], index, "content")} for p in content]
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
        marked, lead = [], ""
        for number, part in enumerate(parts):
            core = part.strip()
            if number % 2 or not core:  # odd parts are the tags
                marked.append(part)
            else:
                before = part[: part.index(core)]
                first = not any(p.strip() for p in parts[:number:2])
                code = self._code(Piece(message, lead + before if first else None, kind))
                marked.append(f"{before}{START}{code}{core}{END}{code}{part[len(before) + len(core) :]}")
            lead += part
        return "".join(marked)

    def _code(self, piece: Piece) -> str:
        number = len(self.pieces)
        if number >= 1 << 20:
            raise Refused("more than a million strings in one conversation")
        self.pieces.append(piece)
        return chr(0xE100 + (number >> 10)) + chr(0xE500 + (number & 1023))


@attrs.define
class ChatRenderer:
    """Renders conversations for one tokenizer. Can be pickled: worker processes get a copy."""

    tokenizer: Any
    """A fast tokenizer of transformers."""
    train_on: Collection[str] = ("assistant",)
    """Roles of the messages that are trained."""
    template_args: dict[str, Any] = attrs.field(factory=dict)
    """More variables for the template (`enable_thinking`)."""
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
        mentioned = {tag for text in self.templates.values() for tag in TAG.findall(text)} - special
        self.tags = re.compile("(" + "|".join(map(re.escape, sorted(mentioned))) + ")") if mentioned else None
        self.prompt = self._generation_prompt()

    def render(self, conversation: dict[str, Any]) -> Rendered:
        """Return the text of a conversation and its trained spans.

        Args:
            conversation: `messages`, and perhaps `tools`, and `shared`: how many messages at its beginning are not
                trained, whatever their role.

        Raises:
            Refused: the template refuses it, or the spans cannot be told for certain.
        """
        messages, tools = conversation["messages"], conversation.get("tools")
        text = self._plain(messages, tools)
        if START in text or END in text:
            raise Refused("the text holds U+E000 or U+E001, which posttrain uses as markers")
        marker = Marker(self.tags)
        marked = marker.conversation(messages)
        unmarked, pieces = _unmarked(self._plain(marked, tools), marker.pieces)
        if unmarked != text:
            raise Refused(
                "the chat template changes or inspects the text of the messages (with markers around it, it renders "
                "something else), so that the trained part cannot be told for certain"
            )
        spans = [
            self._span(index, conversation, text, pieces)
            for index, message in enumerate(messages)
            if message["role"] in self.train_on and index >= conversation.get("shared", 0)
        ]
        if not spans:
            raise Refused(f"no message has a trained role ({', '.join(self.train_on)}), so nothing would be learned")
        return Rendered(text, pieces, spans, self._turns(text, pieces, messages))

    def _template(self, with_tools: bool) -> str:
        try:
            return str(self.tokenizer.get_chat_template(tools=[{}] if with_tools else None))
        except ValueError as error:  # several templates, none of them the default
            raise DataError(f"the tokenizer's chat template cannot be chosen: {error}") from None

    def _plain(self, messages: list[dict[str, Any]], tools: Any, ask: bool = False) -> str:
        """Render as `apply_chat_template(tokenize=False)` does, without its checks per call."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            template = _compile_jinja_template(self.templates[bool(tools)])
            rendered = template.render(
                messages=[_aliased(message) for message in messages], tools=tools, documents=None,
                add_generation_prompt=ask, strftime_now=TODAY.strftime,
                **{**self.tokenizer.special_tokens_map, **self.template_args},
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise Refused(f"the chat template refuses the conversation: {error}") from None
        return str(rendered)

    def _generation_prompt(self) -> str:
        sample = [{"role": "user", "content": "x"}]
        try:
            with_prompt, without = self._plain(sample, None, ask=True), self._plain(sample, None)
        except Refused:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    def _span(
        self, index: int, conversation: dict[str, Any], text: str, pieces: list[tuple[Piece, int, int]]
    ) -> tuple[int, int]:
        """Return where the trained part of a message starts and ends."""
        message = conversation["messages"][index]
        role = message["role"]
        if is_blank(message.get("content")) and not message.get("tool_calls"):
            # Nothing marks where it is, and behind reasoning the first token that ends something is not its end.
            raise Refused(f"a message of role {role!r} is empty")
        order = [n for n, (piece, _, _) in enumerate(pieces) if piece.message == index]
        if not order:
            raise Refused(f"the chat template leaves out a message of role {role!r}")
        first, last = order[0], order[-1]
        if last - first >= len(order):
            raise Refused("the chat template mixes a trained message with another one")
        if len({id(pieces[n][0]) for n in order}) < len(order):
            raise Refused("the chat template writes a trained message more than once")
        after = pieces[last + 1][1] if last + 1 < len(pieces) else len(text)
        end = self.stops.search(text, pieces[last][2], after)
        if end is None:
            raise Refused(
                f"after a message of role {role!r} the chat template writes no end-of-turn token, so the model would "
                "never learn to stop: add {{ eos_token }} behind its content, with `tokenizer.chat_template`"
            )
        return self._start(first, role, conversation, text, pieces), end.end()

    def _start(
        self, first: int, role: str, conversation: dict[str, Any], text: str, pieces: list[tuple[Piece, int, int]]
    ) -> int:
        """Return where the trained part of the message that begins with piece `first` starts."""
        piece, start, _ = pieces[first]
        before = pieces[first - 1][2] if first else 0
        if role == "assistant" and self.prompt and (found := text.count(self.prompt, before, start)):
            if found > 1:
                raise Refused("the generation prompt is there more than once before a reply (behind an empty message?)")
            return text.index(self.prompt, before, start) + len(self.prompt)
        if piece.kind != "content" or piece.lead is None:
            raise Refused(
                f"a message of role {role!r} begins with what the template writes, and the template's generation "
                "prompt is not in front of it, so where the reply begins cannot be told"
            )
        if not piece.lead or not text.endswith(piece.lead, before, start):
            if piece.lead.strip():
                raise Refused("the chat template rewrites the beginning of a reply, and has no generation prompt there")
            return start
        if piece.lead.strip() or self._keeps_lead(piece, conversation, text):
            return start - len(piece.lead)
        return start

    def _keeps_lead(self, piece: Piece, conversation: dict[str, Any], text: str) -> bool:
        """Tell whether the whitespace before a reply is its own or the template's, by leaving it out."""
        messages = list(conversation["messages"])
        content = messages[piece.message]["content"]
        if not isinstance(content, str):
            content = content[0]["text"] if len(content) == 1 else ""
        messages[piece.message] = messages[piece.message] | {"content": content.lstrip()}
        return self._plain(messages, conversation.get("tools")) != text

    def _turns(
        self, text: str, pieces: list[tuple[Piece, int, int]], messages: list[dict[str, Any]]
    ) -> list[tuple[int, str]]:
        turns = []
        for number, (piece, _, end) in enumerate(pieces):
            follower = pieces[number + 1] if number + 1 < len(pieces) else None
            if follower is None or follower[0].message != piece.message:
                stop = self.stops.search(text, end, follower[1] if follower else len(text))
                turns.append((stop.end() if stop else end, str(messages[piece.message]["role"])))
        return turns


def is_blank(content: Any) -> bool:
    """Whether a message's content (text, text parts or nothing) holds nothing but whitespace."""
    parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    return not any(part.strip() for part in parts)


def stop_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that may end a turn: eos, those of a generation_config.json, and well-known special ones."""
    import json
    from pathlib import Path

    stops = {token for token in STOPS if token in set(tokenizer.all_special_tokens) | set(special_tokens(tokenizer))}
    if tokenizer.eos_token:
        stops.add(tokenizer.eos_token)
    config = Path(tokenizer.name_or_path) / "generation_config.json"
    if config.is_file():
        ids = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        stops |= {
            tokenizer.convert_ids_to_tokens(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None
        }
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
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _unmarked(marked: str, known: list[Piece]) -> tuple[str, list[tuple[Piece, int, int]]]:
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
