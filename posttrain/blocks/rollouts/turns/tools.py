"""The environment of tools: functions that the policy may call, and whose results it is told."""

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs
from attrs.validators import gt, optional

from posttrain.blocks.rollouts.replies import Call, Outcome, Turn
from posttrain.blocks.rollouts.rewards import Late, limited
from posttrain.errors import RegistryError
from posttrain.interfaces import Episode
from posttrain.registry import block, key, suggest

F = TypeVar("F", bound=Callable[..., Any])
_tools: dict[str, Callable[..., Any]] = {}


def tool(function: F) -> F:
    """Make a function a tool that recipes can name: `environment: {type: tools, tools: [calculator]}`.

    Its arguments need types, and its docstring says what it and each of its arguments is for, in the way of Google
    (`Args:`): the model reads that. What it returns is told to the model as text, and an exception by its message.

    Raises:
        RegistryError: another function has its name.
    """
    known = _tools.get(function.__name__)
    if known is not None and inspect.getmodule(known) is not inspect.getmodule(function):
        raise RegistryError(f"the tool {function.__name__!r} exists already; give yours another name")
    _tools[function.__name__] = function
    return function


def named() -> dict[str, Callable[..., Any]]:
    """Return the functions with `@tool`, by name."""
    return _tools


@block("environment", "tools")
class ToolEnvironment:
    """Tools that the policy may call. A turn without a call is its answer, and ends the conversation.

    Calls are read in the way in which the chat template writes them; what cannot be read is told to the model.
    """

    functions: list[str] = key(also=("tool_names",))
    """Names of functions with `@tool`."""
    max_turns: int = key(4, check=gt(0))
    """Turns that the policy has at most; a conversation in which it still calls then is cut off, and counted."""
    max_tokens: int = key(2048, check=gt(0))
    """Tokens by which a conversation may grow, of all turns and results together; then it is cut off, and counted."""
    announce: bool = True
    """Let the chat template list the tools in each prompt. False where the prompts say in words what there is, for
    templates that know no tools."""
    seconds: float | None = key(10.0, check=optional(gt(0)))
    """How long a call may take; null for as long as it likes."""

    @property
    def weight(self) -> float:
        """Tools give no rewards."""
        return 0.0

    @property
    def tools(self) -> list[dict[str, Any]]:
        """What the chat template lists."""
        from transformers.utils import get_json_schema

        return [get_json_schema(_tools[name]) for name in self.functions] if self.announce else []

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield tools that there are not."""
        known = ", ".join(_tools) or "none; `code:` names the file with yours"
        for name in self.functions:
            if name not in _tools:
                yield "functions", f"there is no tool {name!r}{suggest(name, _tools)} (known: {known})"

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
            said.append(("", f"error: {turn.trouble}"))
        return Outcome([{"role": "tool", "name": name, "content": text} for name, text in said])

    def result(self, call: Call) -> str:
        """Return what the model is told of a call."""
        if call.name not in self.block.functions:
            return f"error: there is no tool {call.name!r}; there is {', '.join(self.block.functions)}"
        try:
            with limited(self.block.seconds):
                made = _tools[call.name](**call.arguments)
        except Late:
            return f"error: it took longer than {self.block.seconds:g} s"
        except Exception as error:
            return f"error: {error}"
        return made if isinstance(made, str) else json.dumps(made, ensure_ascii=False, default=str)
