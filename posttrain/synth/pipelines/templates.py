"""Templates: text with places for columns of a row, in braces or in Jinja; a column that is not there is an error."""

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import DataError
from posttrain.synth.pipelines.rows import as_text, column

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Syntax = Literal["braces", "jinja"]
PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")
MISSING = re.compile(r"'(\w+)' is undefined")


def filled(template: str, row: Mapping[str, Any], syntax: Syntax = "braces") -> str:
    """Put the columns of a row into a template.

    Raises:
        DataError: it names a column that the row lacks, or Jinja cannot make text of it.

    >>> filled("{{{a}}}: {b}", {"a": 1, "b": "x{a}"})
    '{1}: x{a}'
    >>> filled("{% for x in a %}{{ x }};{% endfor %}", {"a": [1, 2]}, "jinja")
    '1;2;'
    """
    if syntax == "jinja":
        return _rendered(template, row)

    def value(found: re.Match[str]) -> str:
        return found[0][0] if not found[1] else as_text(column(row, found[1]))

    return PLACE.sub(value, template)


def problem(template: str, syntax: Syntax) -> str | None:
    """Return what is wrong with a template, whatever the row; None if nothing is."""
    if syntax == "braces":
        return None
    from jinja2 import TemplateSyntaxError

    try:
        _compiled(template)
    except TemplateSyntaxError as error:
        return f"is no Jinja: line {error.lineno}: {error.message}"
    return None


def _rendered(template: str, row: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError, UndefinedError

    try:
        return _compiled(template).render(dict(row))
    except UndefinedError as error:
        if found := MISSING.match(str(error)):
            column(row, found[1])  # says which columns there are
        raise DataError(f"the template asks for what is not there: {error} (columns: {', '.join(row)})") from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise DataError(f"the template cannot be filled: {type(error).__name__}: {error}") from None


@cache
def _compiled(template: str) -> "Template":
    return _environment().from_string(template)


@cache
def _environment() -> "ImmutableSandboxedEnvironment":
    """Return Jinja without access to Python's insides: rows and recipes come from others, too."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return made
