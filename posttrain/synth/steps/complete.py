"""Complete: text that goes on from a text, without a chat template in between (`/completions`)."""

from collections.abc import Iterable, Iterator
from typing import Any

from attrs.validators import gt, min_len

from posttrain.registry import block, key
from posttrain.synth.pipelines.rows import Chat, Drop, Reply, Row
from posttrain.synth.pipelines.step import Asking
from posttrain.synth.pipelines.templates import Syntax, filled, problem

COMPLETIONS = "/completions"


@block("step", "complete")
class Complete(Asking):
    """Let a model go on from a text, as it stands: for base models, and for Magpie (arXiv:2406.08464), where an aligned
    model that sees only the beginning of a user's turn writes the turn.

    Needs a server with `/completions` (vLLM). The row gets the text that was added, and `finish_reason`.
    """

    prompt: str = key(check=min_len(1))
    """The text to go on from; `{column}` stands for a column."""
    syntax: Syntax = "braces"
    """Of the template: `{column}`, or `jinja`."""
    n: int = key(1, check=gt(0))
    """Texts per row."""
    into: str = "response"
    """Column of what was added, without white space around it."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the template, and what would be paid in vain."""
        if wrong := problem(self.prompt, self.syntax):
            yield "prompt", wrong
        if "n" in self.body:
            yield "body", "n pays for several texts of which one is kept: give `n` of the step"

    def chats(self, row: Row) -> list[Chat]:
        """Return `n` equal requests; equal ones in a task are samples, not repetitions."""
        body = {"prompt": filled(self.prompt, row, self.syntax), **self.body}
        return [Chat([], self.model, body, COMPLETIONS) for _ in range(self.n)]

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the row once for every text."""
        for reply in replies:
            said = reply.choice.get("text")
            if not isinstance(said, str) or not said.strip():
                error: dict[str, Any] = reply.error or {}
                yield Drop(row, reply.trouble, str(error.get("message") or ""))
                continue
            yield {**row, self.into: said.strip(), "finish_reason": reply.choice.get("finish_reason")}
