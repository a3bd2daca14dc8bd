"""Tools that a model may call: the functions under `@tool`, which reinforcement learning lets a policy call as well.

What a model is told of a function, it is told here as there: by its types and its docstring.
"""

import hashlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import attrs

from posttrain.blocks.rollouts.turns.tools import named, tool
from posttrain.errors import SynthError
from posttrain.registry import suggest
from posttrain.synth.ledger.replies import parsed
from posttrain.synth.pipelines.rows import as_text

__all__ = ["PythonTool", "found", "given", "tool"]

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What providers take as the name of a tool."""


def found(given: Any) -> Callable[..., Any]:
    """Return a tool that was given by its name, or as a function.

    Raises:
        SynthError: there is none of that name, or it is no function.
    """
    if isinstance(given, str):
        if given not in named():
            known = ", ".join(named()) or "none; put @tool above a function in a file that `code:` names"
            raise SynthError(f"there is no tool {given!r}{suggest(given, named())} (known: {known})")
        return named()[given]
    if not callable(given) or not NAME.fullmatch(getattr(given, "__name__", "")):
        raise SynthError(f"a tool is a function with a name, or the name of one, not {type(given).__name__}")
    function: Callable[..., Any] = given
    return function


@attrs.frozen(slots=False)
class PythonTool:
    """A function as a tool."""

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """What models call it."""
        return self.function.__name__

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What a request says of it, in OpenAI's form.

        Raises:
            SynthError: its parameters cannot be described, or calls cannot be checked.
        """
        from transformers.utils import get_json_schema
        from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

        if importlib.util.find_spec("jsonschema") is None:
            raise SynthError("tools need the package jsonschema: pip install 'posttrain[schema]'")
        try:
            made = dict(get_json_schema(self.function)["function"])
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise SynthError(f"the tool {self.name!r} cannot be described to a model: {error}") from None
        made.pop("return", None)  # providers know no such key
        return {"type": "function", "function": made}

    @property
    def identity(self) -> str:
        """What changes when the function does."""
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):  # made in a prompt
            source = ""
        return f"{self.function.__module__}.{self.name}:{hashlib.sha256(source.encode()).hexdigest()[:16]}"

    def call(self, arguments: dict[str, Any]) -> tuple[str, bool]:
        """Return (what it says, whether it failed): arguments that do not fit, or an error of its own."""
        from jsonschema.validators import validator_for

        schema = self.spec["function"]["parameters"]
        wrong = list(validator_for(schema)(schema).iter_errors(arguments))
        if wrong:
            said = "; ".join(f"{'.'.join(map(str, e.path)) or 'it'}: {e.message[:200]}" for e in wrong[:5])
            return f"Error: the arguments do not fit: {said}", True
        try:
            return as_text(plain(self.function(**arguments))), False
        except Exception as error:
            return f"Error: {type(error).__name__}: {error}", True


def plain(value: Any) -> Any:
    """Return what a tool gave as JSON data; what is none as text."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def given(arguments: Any) -> dict[str, Any] | None:
    """Return the arguments of a call as an object; None if they are none."""
    if isinstance(arguments, str):
        arguments = parsed(arguments.encode("utf-8", "surrogatepass")) if arguments.strip() else {}
    return arguments if isinstance(arguments, dict) else None
