"""Verify: answers that a program can check score 1 or 0."""

import inspect
import json
import re
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import attrs

from posttrain.errors import DataError, PosttrainError
from posttrain.registry import block, suggest
from posttrain.synth.pipelines.rows import Drop, Row, answered, as_text, column
from posttrain.synth.pipelines.step import Step

F = TypeVar("F", bound=Callable[..., bool | float])
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
NUMBER = re.compile(rf"((?<![\w).])[-+\u2212])?\s?\$?({DIGITS})(?:\s?/\s?({DIGITS}))?")
_verifiers: dict[str, Callable[..., bool | float]] = {}


def verifier(name: str) -> Callable[[F], F]:
    """Give a function a name that recipes can use: `{type: verify, function: name}`.

    It takes the answer (text), then the row, and the `options` of the step by name; it returns whether the answer is
    right, or a number.

    >>> @verifier("doctest-shout")
    ... def shout(answer, row):
    ...     return answer.isupper()
    """

    def register(function: F) -> F:
        _verifiers[name] = function
        return function

    return register


@verifier("number")
def number(answer: str, row: Row, *, wanted: str = "answer") -> bool:
    """The last number of the answer is the last one of the row's `answer`, as in GSM8K."""
    right, found = last_number(as_text(column(row, wanted))), last_number(answer)
    return right is not None and right == found


@verifier("exact")
def exact(answer: str, row: Row, *, wanted: str = "answer") -> bool:
    """The answer is the row's `answer`, whatever the case and the white space."""
    return answer.lower().split() == as_text(column(row, wanted)).lower().split()


@verifier("json_schema")
def json_schema(answer: str, row: Row, *, schema: dict[str, Any] | None = None, wanted: str | None = None) -> bool:
    """The answer is JSON, and fits `schema`, or the schema in a column; a code block around it is fine."""
    from jsonschema import ValidationError, validate

    fenced = re.search(r"```(?:json)?\s*(.*?)```", answer, flags=re.DOTALL)
    form = schema_of(column(row, wanted) if wanted else schema or {})
    try:
        validate(json.loads(fenced[1] if fenced else answer), form)
    except (ValueError, RecursionError, ValidationError):
        return False
    return True


def schema_of(given: Any) -> Any:
    """Return a JSON schema that was given as data or as text.

    Raises:
        DataError: it is none.
    """
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        form = json.loads(given) if isinstance(given, str) else given
        if not isinstance(form, dict | bool):
            raise DataError(f"a JSON schema is an object, not {type(form).__name__}")
        validator_for(form).check_schema(form)  # type: ignore[arg-type]  # true and false are schemas as well
    except (SchemaError, ValueError) as error:
        raise DataError(f"not a valid JSON schema: {str(error).splitlines()[0]}") from None
    return form


@verifier("math")
def mathematics(answer: str, row: Row, *, wanted: str = "answer") -> bool:
    """The answer is the same mathematics as the row's `answer`, as 1/2, 0.5 and `\\boxed{\\frac{1}{2}}` are. By the
    package math-verify."""
    from math_verify import parse, verify

    # Its time limits are alarms, which only the main thread can set.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    text = as_text(column(row, wanted))
    right = parse(text, parsing_timeout=seconds) or parse(f"${text}$", parsing_timeout=seconds)
    if not right:
        raise ValueError(f"the right answer is no mathematics: {text[:200]}")
    return bool(verify(right, parse(answer, parsing_timeout=seconds), timeout_seconds=seconds))


@verifier("code")
def program(
    answer: str, row: Row, *, wanted: str = "tests", seconds: int = 10, memory_mb: int = 1024, partial: bool = False
) -> float:
    """The Python in the answer passes the row's `tests`, in a sandbox: text with asserts, a list of such, or a list of
    `{input, output}` for programs that read and print. With `partial`, the share of the tests that it passes."""
    tests = column(row, wanted)
    cases = tests if isinstance(tests, list) else [tests]
    if not cases or not all(isinstance(case, str | dict) for case in cases):
        raise DataError(f"column {wanted!r} holds no tests: text, or a list of texts or of {{input, output}}")
    if not partial and all(isinstance(case, str) for case in cases):
        cases = ["\n".join(cases)]
    source = code_in(answer)
    passed = 0
    for case in cases:
        passed += passes(source, case, seconds, memory_mb)
        if not partial and not passed:
            break
    return passed / len(cases) if partial else float(passed == len(cases))


def passes(source: str, case: str | dict[str, Any], seconds: int, memory_mb: int) -> bool:
    """Whether a program passes one test."""
    from posttrain.synth.steps import sandbox

    if isinstance(case, str):
        return sandbox.run(("answer.py", source), ("tests.py", case), seconds=seconds, memory_mb=memory_mb).ended
    given, wanted = (as_text(case.get(name, "")) for name in ("input", "output"))
    ran = sandbox.run(("answer.py", source), stdin=given, seconds=seconds, memory_mb=memory_mb)
    lines = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (ran.out, wanted))
    return ran.ended and next(lines) == next(lines)


def code_in(answer: str) -> str:
    """Return the Python of an answer: the last block of code, or all of it if there is none.

    >>> code_in("So:\\n```python\\nprint(1)\\n```\\nDone.")
    'print(1)\\n'
    """
    found = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", answer, flags=re.DOTALL | re.IGNORECASE)
    return str(found[-1]) if found else answer


@block("step", "verify")
class Verify(Step):
    """Check answers by a function. The row gets `score`: 1 if the answer is right, 0 if not."""

    function: str | Callable[..., bool | float]
    """`number` (the last number is that of the column `answer`, as in GSM8K), `exact`, `math` (the same mathematics),
    `code` (Python that passes the column `tests`, in a sandbox), `json_schema`, one of your own by `@verifier("name")`,
    or from Python a function of the answer and the row."""
    wanted: str | None = None
    """Column that holds the right answer (`answer` unless given), the tests (`tests`), or the schema."""
    options: dict[str, Any] = attrs.field(factory=dict)
    """Further arguments of the function: `schema`; of `code` `seconds`, `memory_mb` and `partial`."""
    into: str = "score"
    """Column of the score."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be."""
        if isinstance(self.function, str) and self.function not in _verifiers:
            known = ", ".join(_verifiers)
            yield (
                "function",
                f"there is no verifier {self.function!r}{suggest(self.function, _verifiers)} (known: {known})",
            )
            return
        function = _verifiers[self.function] if isinstance(self.function, str) else self.function
        takes = inspect.signature(function).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()):
            for name in sorted(self.options.keys() - set(takes)):
                yield "options", f"the check takes no {name!r}{suggest(name, list(takes)[2:])}"
        if self.function == "math":
            import importlib.util

            if importlib.util.find_spec("math_verify") is None:
                yield "function", "math needs the package math-verify: pip install 'posttrain[math]'"
        if self.function == "code":
            from posttrain.synth.steps.sandbox import unavailable

            if reason := unavailable():
                yield "function", reason
        if self.function == "json_schema":
            import importlib.util

            if importlib.util.find_spec("jsonschema") is None:
                yield "function", "json_schema needs the package jsonschema: pip install 'posttrain[schema]'"
                return
            try:
                schema_of(self.options.get("schema") or {})
            except DataError as error:
                yield "options", f"schema: {error}"

    def score(self, answer: str, row: Row) -> float:
        """Return what the check says of an answer."""
        function = _verifiers[self.function] if isinstance(self.function, str) else self.function
        more = {"wanted": self.wanted} if self.wanted else {}
        return float(function(answer, row, **more, **self.options))

    def fold(self, row: Row, replies: list[Any]) -> Iterable[Row | Drop]:
        """Return the row with its score; one whose check fails to run is dropped with the reason, and counted."""
        text = answered(row)[1]
        try:
            score = self.score(text, row)
        except PosttrainError:
            raise
        except Exception as error:
            return [Drop(row, f"the check raised {type(error).__name__}", str(error))]
        return [{**row, self.into: score}]

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return the share of right answers."""
        scores = [float(row[self.into]) for row in rows]
        return {"mean score": statistics.fmean(scores)} if scores else {}


def last_number(text: str) -> float | None:
    """Return the last number of a text: `1,200.50`, `1e3`, `-3` with a hyphen or a minus sign, `1/2`.

    >>> last_number("so 3 * 4 = 12, that is $1,200.50."), last_number("1/2"), last_number("none")
    (1200.5, 0.5, None)
    """
    found = [*NUMBER.finditer(text)]
    if not found:
        return None
    sign, above, below = found[-1].groups()
    number = float(above.replace(",", ""))
    if below and float(below.replace(",", "")):
        number /= float(below.replace(",", ""))
    elif below:  # nothing is over zero: then it is no fraction
        number = float(below.replace(",", ""))
    return number if sign in (None, "+") else -number
