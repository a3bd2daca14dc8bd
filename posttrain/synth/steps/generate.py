"""Generate: a row -> rows with an answer to it, from one model or several."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from attrs.validators import ge, gt

from posttrain.blocks.data.rows.schemas import CHATS
from posttrain.errors import DataError
from posttrain.registry import block, key
from posttrain.synth.ledger.replies import calls_of, parsed, with_thoughts
from posttrain.synth.pipelines.images import beside
from posttrain.synth.pipelines.rows import Chat, Drop, Message, Reply, Row, as_text
from posttrain.synth.pipelines.step import PanelStep, Prompting, asked_again
from posttrain.synth.steps.form import Form, Unfit, json_text

TAKEN = ("prompt", "messages", "model", "finish_reason", "reasoning")
"""Columns that this step makes itself."""


@block("step", "generate")
class Generate(Prompting, PanelStep):
    """Ask a model about each row.

    What comes out is the row with `prompt` (the messages that were sent), `response` (text), `model` and
    `finish_reason`: SFT trains on it as it is. A row's `tools` are sent along; where the answer is a tool call, the
    whole conversation is in `messages` instead of `prompt` and `response`.
    """

    n: int = key(1, also=("samples",), check=gt(0))
    """Answers per row and model."""
    schema: Any = None
    """The form of the replies: a JSON schema of an object, or from Python a pydantic model. Its properties become typed
    columns of the row; a reply that does not fit is asked for again, with what was wrong."""
    asks_again: int = key(2, check=ge(0))
    """With `schema`: how often a reply that does not fit is asked for again, before its row is dropped."""
    into: str = "response"
    """Column of the answer."""
    reasoning: Literal["column", "think", "message", "drop"] = "column"
    """Where what the model thought goes, if the server tells it apart: into the column `reasoning`; in `<think>` before
    the answer; into `messages` as `reasoning_content`, which chat templates read and SFT trains on; or nowhere."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts."""
        yield from PanelStep.check(self)
        yield from Prompting.check(self)
        if self.schema is not None:
            if problem := self.form.problem():
                yield "schema", problem
            elif taken := sorted({*TAKEN, self.into} & set(self.form.columns)):
                yield "schema", f"has a property {taken[0]!r}, and the row has a column of that name for other things"
            if "response_format" in self.body:
                yield "body", "response_format means the same as `schema`; keep one of them"
        if "n" in self.body:
            yield "body", "n pays for several answers of which one is kept: give `n` of the step"

    def chats(self, row: Row) -> list[Chat]:
        """Return `n` equal requests for each model; equal ones in a task are samples, not repetitions."""
        if self.schema is not None and (taken := sorted(set(self.form.columns) & set(row))):
            raise DataError(f"the row has a column {taken[0]!r} already, which the schema's property would replace")
        prompt, tools = self.prompt(row), tools_of(row)
        body = {"tools": tools, **self.sent} if tools else self.sent
        return [Chat(prompt, model, body) for model in self.panel for _ in range(self.n)]

    @property
    def form(self) -> Form:
        """The form of the replies; there is one if `schema` is given."""
        return Form(self.schema)

    @property
    def sent(self) -> dict[str, Any]:
        """What every request holds besides model and messages."""
        return self.body if self.schema is None else {**self.form.sent, **self.body}

    @property
    def rounds(self) -> int:
        """How often a reply that does not fit is asked for again."""
        return self.asks_again if self.schema is not None else 0

    def again(self, chat: Chat, reply: Reply) -> Chat | None:
        """Return the question once more, with what was wrong, if the reply does not fit the form."""
        if self.schema is None or reply.error:
            return None
        try:
            self.form.read(reply)
        except Unfit as unfit:
            return asked_again(chat, json_text(reply), str(unfit), as_text(self.form.schema))
        return None

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the row once for every answer."""
        prompt = self.prompt(row)
        kept = beside(row, prompt, *CHATS)
        for chat, reply in zip(self.chats(row), replies, strict=True):
            made: dict[str, Any] = {**kept, "prompt": prompt}
            model = chat.model or (reply.body or {}).get("model")
            about = {"model": model, "finish_reason": reply.choice.get("finish_reason")}
            message = reply.choice.get("message") or {}
            calls = message["tool_calls"] if calls_of(message) else None
            if self.schema is not None and reply.error is None:
                yield self.formed(made, reply, about)
                continue
            thought = None if self.reasoning == "drop" else reply.reasoning
            if reply.error is None and (calls or (thought and self.reasoning == "message" and reply.text)):
                said: Message = {"role": "assistant", "content": reply.text or ""}
                said |= ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thought} if thought else {})
                yield {**kept, "messages": [*prompt, said], **about}
                continue
            if reply.text is None:
                yield Drop(made, reply.trouble, as_text((reply.error or {}).get("message") or reply.refusal or ""))
                continue
            if self.reasoning == "think":
                yield {**made, self.into: with_thoughts(reply.text, thought), **about}
            else:
                yield {**made, self.into: reply.text, **about, **({"reasoning": thought} if thought else {})}

    def formed(self, made: Row, reply: Reply, about: Row) -> Row | Drop:
        """Return the row with what a reply says in its form, or drop it with what is wrong."""
        try:
            said = self.form.read(reply)
        except Unfit as unfit:
            return Drop({**made, self.into: json_text(reply)}, "the reply does not fit the schema", str(unfit))
        return {**made, self.into: as_text(said), **said, **about}


def tools_of(row: Row) -> list[Any]:
    """Return the tools that a row offers, also where they were stored as JSON text.

    Raises:
        DataError: they are no list.
    """
    given = row.get("tools")
    tools = parsed(given.encode("utf-8", "surrogatepass")) if isinstance(given, str) else given
    if given and not isinstance(tools, list):
        raise DataError("column 'tools' holds no list of tools")
    return tools or []
