"""The tools of data generation as an environment of reinforcement learning: functions that the policy may call."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import attrs
from attrs.validators import gt, min_len, optional

from posttrain.blocks.rollouts.replies import Call, Outcome, Turn
from posttrain.blocks.rollouts.rewards import Late, limited
from posttrain.interfaces import Episode
from posttrain.registry import block, key, suggest
from posttrain.synth.steps.turns.toolbox import Toolbox


@block("environment", "tools")
class ToolEnvironment:
    """Tools that the policy may call, as in the step `converse` of data generation. A turn without a call is its
    answer, and ends the conversation.

    Calls are read in the way in which the chat template writes them; what cannot be read is told to the model.
    """

    tools: list[Any] = key(check=min_len(1))
    """Functions with `@tool`, by their names; from Python also the functions themselves. They must give the same for
    the same arguments."""
    max_turns: int = key(4, check=gt(0))
    """Turns that the policy has at most; a conversation in which it still calls then is cut off, and counted."""
    max_tokens: int = key(2048, check=gt(0))
    """Tokens by which a conversation may grow, of all turns and results together; then it is cut off, and counted."""
    announce: bool = True
    """Let the chat template list the tools in each prompt. False where the prompts say in words what there is, for
    templates that know no tools."""
    seconds: float | None = key(10.0, check=optional(gt(0)))
    """How long a call may take; null for as long as it likes."""

    @cached_property
    def box(self) -> Toolbox:
        """The tools."""
        return Toolbox(self.tools, {})

    @property
    def weight(self) -> float:
        """Tools give no rewards."""
        return 0.0

    @property
    def specs(self) -> list[dict[str, Any]]:
        """What the chat template lists."""
        return self.box.specs if self.announce else []

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield tools that there are not, or that cannot be described."""
        yield from (("tools", problem) for problem in self.box.problems())

    def reset(self, row: dict[str, Any]) -> Episode:
        """Return a conversation; tools remember nothing."""
        return Using(self)


@attrs.frozen
class Using:
    """A conversation with tools."""

    block: ToolEnvironment

    def step(self, turn: Turn) -> Outcome:
        """Return the results of the calls of a turn."""
        said = [(call.name, self.result(call)) for call in turn.calls]
        if turn.trouble:
            said.append(("", f"Error: {turn.trouble}"))
        return Outcome([{"role": "tool", "name": name, "content": text} for name, text in said])

    def result(self, call: Call) -> str:
        """Return what the model is told of a call."""
        known = self.block.box.python
        if call.name not in known:
            hint = suggest(call.name, known)
            return f"Error: there is no tool {call.name!r}{hint} (there are: {', '.join(known)})"
        try:
            with limited(self.block.seconds):
                return known[call.name].call(call.arguments)[0]
        except Late:
            return f"Error: it took longer than {self.block.seconds:g} s"
