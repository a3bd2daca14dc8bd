"""Generate: a row -> rows with an answer to it, from one model or several."""

from collections.abc import Iterable, Iterator
from typing import Any

import attrs
from attrs.validators import gt

from posttrain.blocks.data.rows.schemas import CHATS
from posttrain.registry import block, key
from posttrain.synth.pipelines.rows import Chat, Drop, Message, Reply, Row, as_text, asked, filled
from posttrain.synth.pipelines.step import PanelStep, Template


@block("step", "generate")
class Generate(PanelStep):
    """Ask a model about each row.

    What comes out is the row with `prompt` (the messages that were sent), `response` (text), `model` and
    `finish_reason`: SFT trains on it as it is.
    """

    template: str | None = None
    """The user's turn; `{column}` stands for a column. Without it, and without `messages`, the row's own `prompt` or
    conversation is asked."""
    messages: list[Template] = attrs.field(factory=list)
    """The conversation to send, where one turn is not enough."""
    n: int = key(1, also=("samples",), check=gt(0))
    """Answers per row and model."""
    into: str = "response"
    """Column of the answer."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts."""
        yield from super().check()
        if self.template is not None and self.messages:
            yield "template", "is the user's turn of `messages`; give one of the two"

    def prompt(self, row: Row) -> list[Message]:
        """Return the messages to send about a row."""
        if self.template is not None:
            return [{"role": "user", "content": filled(self.template, row)}]
        if self.messages:
            return [{"role": m.role, "content": filled(m.content, row)} for m in self.messages]
        return asked(row)

    def chats(self, row: Row) -> list[Chat]:
        """Return `n` equal requests for each model; equal ones in a task are samples, not repetitions."""
        prompt = self.prompt(row)
        return [Chat(prompt, model, self.body) for model in self.panel for _ in range(self.n)]

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the row once for every answer."""
        kept = {name: value for name, value in row.items() if name not in CHATS}
        prompt = self.prompt(row)
        for chat, reply in zip(self.chats(row), replies, strict=True):
            made: dict[str, Any] = {**kept, "prompt": prompt}
            if reply.text is None:
                yield Drop(made, reply.trouble, as_text((reply.error or {}).get("message") or ""))
                continue
            model = chat.model or (reply.body or {}).get("model")
            finish = reply.choice.get("finish_reason")
            yield {**made, self.into: reply.text, "model": model, "finish_reason": finish}
