"""What a step of a pipeline is: a pure function from rows to requests, and from a row with its replies to rows.

A row is a dict of columns. A step never sees a reply but as the answer to what it asked about that very row, so that
no row can get what another one was answered.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from posttrain.interfaces import SynthBlock
from posttrain.registry import key
from posttrain.synth.pipelines.images import with_images
from posttrain.synth.pipelines.pipeline import Pipeline
from posttrain.synth.pipelines.rows import Chat, Drop, Message, Reply, Row, asked
from posttrain.synth.pipelines.templates import Syntax, filled, problem


class Step:
    """Base of all steps; a step of your own overrides what it needs.

    >>> class Short(Step):
    ...     def fold(self, row, replies):
    ...         yield row if len(row["response"]) < 100 else Drop(row, "too long")
    """

    def chats(self, row: Row) -> list[Chat]:
        """Return what to ask about a row. Called more than once: the same row must give the same requests."""
        return []

    @property
    def rounds(self) -> int:
        """How many waves of requests, of what `again` and `then` return, may follow the first one."""
        return 0

    def again(self, chat: Chat, reply: Reply) -> Chat | None:
        """Return what to ask in place of a reply that is of no use; None takes the reply."""
        return None

    def then(self, row: Row, replies: list[Reply]) -> list[Chat]:
        """Return what to ask next about a row, once all that was asked is answered; nothing ends it.

        Called more than once, like `chats`: a function of the row and its replies alone.
        """
        return []

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return what becomes of a row.

        Args:
            row: not to be changed.
            replies: one for each of `chats(row)`, then for each of what `then` returned, in that order; failures
                included. `reply.chat` is what each answers.
        """
        return [row]

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return what becomes of all rows together, after `fold`."""
        return rows

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return what is worth knowing about the rows that this step has passed on."""
        return {}

    @property
    def panel(self) -> list[str | None]:
        """The models that are asked; none unless it is a step that asks."""
        return []

    @property
    def sent(self) -> dict[str, Any]:
        """What every request holds besides model and messages."""
        return {}

    @property
    def others(self) -> dict[str, SynthBlock]:
        """Who answers besides the step's client: chats name them by `to`."""
        return {}

    def __or__(self, other: "Step | Pipeline") -> Pipeline:
        """Put another step behind this one."""
        return Pipeline([self]) | other


def asked_again(chat: Chat, text: str | None, trouble: str, form: str) -> Chat:
    """Return a chat that goes on from a reply of no use: what was wrong with it, and the form that is wanted."""
    said = [{"role": "assistant", "content": text}] if text else []
    wanted = {"role": "user", "content": f"That cannot be used: {trouble}. Reply with JSON only: {form}"}
    return attrs.evolve(chat, messages=[*chat.messages, *said, wanted])


@attrs.frozen(kw_only=True, slots=False)
class Asking(Step):
    """Base of steps that send requests."""

    model: str | None = None
    """Which one is to answer."""
    body: dict[str, Any] = attrs.field(factory=dict)
    """Everything else of a request: `{temperature: 0.7, max_tokens: 256}`."""
    client: SynthBlock | None = None
    """Where its requests go, if not where the pipeline's go."""

    @property
    def panel(self) -> list[str | None]:
        """Whom to ask."""
        return [self.model]

    @property
    def sent(self) -> dict[str, Any]:
        """What every request holds besides model and messages."""
        return self.body


@attrs.frozen(kw_only=True, slots=False)
class PanelStep(Asking):
    """Base of steps that can ask several models the same."""

    models: list[str] = attrs.field(factory=list)
    """Several models instead of `model`."""

    @property
    def panel(self) -> list[str | None]:
        """Whom to ask."""
        return [*self.models] or [self.model]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts."""
        if self.model and self.models:
            yield "models", "means the same as `model`; keep one of them"


@attrs.frozen(kw_only=True, slots=False)
class Template:
    """One message of a template."""

    role: str = key()
    """system, user or assistant."""
    content: str = key()
    """Text; `{column}` stands for a column of the row, `{{` and `}}` for braces. With `syntax: jinja`, Jinja."""


@attrs.frozen(kw_only=True, slots=False)
class Prompting(Step):
    """Base of steps that make what they ask from a row."""

    template: str | None = None
    """The user's turn; `{column}` stands for a column. Without it, and without `messages`, the row's own `prompt` or
    conversation is asked."""
    messages: list[Template] = attrs.field(factory=list)
    """The conversation to send, where one turn is not enough."""
    syntax: Syntax = "braces"
    """Of templates: `{column}`, or `jinja`, whose variables are the columns of the row. A column that a row lacks is an
    error in both."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts, and templates that are none."""
        if self.template is not None and self.messages:
            yield "template", "is the user's turn of `messages`; give one of the two"
        if self.template is not None and (wrong := problem(self.template, self.syntax)):
            yield "template", wrong
        for number, message in enumerate(self.messages):
            if wrong := problem(message.content, self.syntax):
                yield "messages", f"entry {number}: {wrong}"

    def prompt(self, row: Row) -> list[Message]:
        """Return the messages to send about a row, its images included."""
        if self.template is not None:
            return with_images([{"role": "user", "content": filled(self.template, row, self.syntax)}], row)
        if self.messages:
            made = [{"role": m.role, "content": filled(m.content, row, self.syntax)} for m in self.messages]
            return with_images(made, row)
        return asked(row)
