"""Verify: answers that a program can check score 1 or 0."""

import json
import re
import statistics
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


@block("step", "verify")
class Verify(Step):
    """Check answers by a function. The row gets `score`: 1 if the answer is right, 0 if not."""

    function: str | Callable[..., bool | float]
    """`number` (the last number is that of the column `answer`, as in GSM8K), `exact`, `json_schema`, one of your own
    by `@verifier("name")`, or from Python a function of the answer and the row."""
    wanted: str | None = None
    """Column that holds the right answer (`answer` unless given), or the schema."""
    options: dict[str, Any] = attrs.field(factory=dict)
    """Further arguments of the function, such as `schema`."""
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
        if self.function == "json_schema":
            import importlib.util

            if importlib.util.find_spec("jsonschema") is None:
                yield "function", "json_schema needs the package jsonschema: pip install 'posttrain[schema]'"
                return
            try:
                schema_of(self.options.get("schema") or {})
            except DataError as error:
                yield "options", f"schema: {error}"

    def fold(self, row: Row, replies: list[Any]) -> Iterable[Row | Drop]:
        """Return the row with its score; one whose check fails to run is dropped with the reason, and counted."""
        function = _verifiers[self.function] if isinstance(self.function, str) else self.function
        more = {"wanted": self.wanted} if self.wanted else {}
        text = answered(row)[1]
        try:
            score = float(function(text, row, **more, **self.options))
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
