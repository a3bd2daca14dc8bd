"""Tools that a model may call: Python functions, described by their types and their docstring."""

import hashlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import attrs

from posttrain.errors import SynthError
from posttrain.registry import suggest
from posttrain.synth.ledger.replies import parsed
from posttrain.synth.pipelines.rows import as_text

F = TypeVar("F", bound=Callable[..., Any])
_tools: dict[str, Callable[..., Any]] = {}
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What providers take as the name of a tool."""


def tool(function: F) -> F:
    """Let recipes name a function as a tool: `{type: converse, tools: [weather]}`.

    Its parameters need types; the docstring says what it does, and under `Args:` what each parameter is. It must give
    the same for the same arguments: it is called once for them, and what it gave is kept.

    >>> @tool
    ... def doctest_weather(city: str, days: int = 1) -> str:
    ...     '''Say how the weather will be.
    ...
    ...     Args:
    ...         city: where.
    ...         days: how many, from today on.
    ...     '''
    ...     return f"sun over {city}"
    """
    _tools[function.__name__] = function
    return function


def found(given: Any) -> Callable[..., Any]:
    """Return a tool that was given by its name, or as a function.

    Raises:
        SynthError: there is none of that name, or it is no function.
    """
    if isinstance(given, str):
        if given not in _tools:
            known = ", ".join(_tools) or "none; put @tool above a function in a file that `code:` names"
            raise SynthError(f"there is no tool {given!r}{suggest(given, _tools)} (known: {known})")
        return _tools[given]
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
            SynthError: its parameters cannot be described.
        """
        text = inspect.getdoc(self.function) or ""
        made = {
            "name": self.name,
            "description": text.partition("\n\n")[0].replace("\n", " "),
            "parameters": self.schema,
        }
        return {"type": "function", "function": made}

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments, with what the docstring says of each."""
        if importlib.util.find_spec("pydantic") is None:
            raise SynthError("tools need the package pydantic: pip install 'posttrain[schema]'")
        from pydantic import PydanticUserError, TypeAdapter

        parameters = inspect.signature(self.function).parameters.values()
        bare = [p.name for p in parameters if p.annotation is p.empty]
        if bare:
            raise SynthError(f"the tool {self.name!r} has a parameter {bare[0]!r} without a type: models must know it")
        try:
            described: TypeAdapter[Any] = TypeAdapter(self.function)  # type: ignore[arg-type]  # functions are fine, too
            made = described.json_schema()
        except PydanticUserError as error:
            raise SynthError(f"the parameters of the tool {self.name!r} cannot be described: {error}") from None
        said = arguments_in(inspect.getdoc(self.function) or "")
        for name, field in made.get("properties", {}).items():
            field.pop("title", None)
            if name in said:
                field.setdefault("description", said[name])
        return made

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
        from pydantic import ValidationError, validate_call

        try:
            return as_text(plain(validate_call(self.function)(**arguments))), False
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:5])
            return f"Error: the arguments do not fit: {wrong}", True
        except Exception as error:
            return f"Error: {type(error).__name__}: {error}", True


def arguments_in(text: str) -> dict[str, str]:
    """Return what a docstring says of each parameter, under `Args:`.

    >>> arguments_in("Add.\\n\\nArgs:\\n    a (int): the first,\\n        or so.\\n    b: the second.\\n")
    {'a': 'the first, or so.', 'b': 'the second.'}
    """
    _, _, rest = text.partition("Args:\n")
    listed = re.split(r"\n\s*\n|\n(?=\S)", rest)[0]
    made: dict[str, str] = {}
    indent = len(listed) - len(listed.lstrip())
    for line in listed.splitlines():
        begun = re.match(rf"\s{{{indent}}}(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line) if indent else None
        if begun:
            made[name := begun[1]] = begun[2].strip()
        elif made:
            made[name] += " " + line.strip()
    return made


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
