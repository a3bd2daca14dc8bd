"""Scalars of a recipe -> values, strictly: "false" is not true, 1.9 is not 1, true is not 1, NaN is no number."""

import math
import re
from pathlib import Path
from typing import Any, TypeAlias, get_args

from posttrain.errors import RecipeError
from posttrain.registry import suggest
from posttrain.values import Key, Secret, expanded
from posttrain.yaml12 import Plain, number, shortened

Problem: TypeAlias = tuple[Key, str]


class Problems(Exception):
    """What is wrong with a value, each under its key as seen from that value."""

    def __init__(self, *found: Problem) -> None:
        super().__init__(*found)
        self.found = list(found)


def wrong(expected: str, value: Any) -> Problems:
    """Return the problem that a value is not what its field takes."""
    got = {dict: "a mapping", list: "a list", type(None): "null"}.get(type(value)) or shortened(value)
    return Problems(((), f"expected {expected}, got {got}"))


def structure_bool(data: Any, _: Any) -> bool:
    """Take true or false, and nothing that Python would count as such."""
    if not isinstance(data, bool):
        raise wrong("true or false", data)
    return data


def structure_int(data: Any, _: Any) -> int:
    """Take a whole number, also written 10k, 1_000 or 1e3."""
    value = number(data) if isinstance(data, Plain) else data
    if type(value) is float and math.isfinite(value) and value == int(value):
        value = int(value)
    if type(value) is not int:
        raise wrong("a whole number", data)
    return value


def structure_float(data: Any, _: Any) -> float:
    """Take a finite number, also written 10k, 1_000 or 1.5%."""
    value = number(data) if isinstance(data, Plain) else data
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong("a number", data)
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise wrong("a finite number", data)
    return value


def structure_str(data: Any, _: Any) -> str:
    """Take text as it is."""
    if not isinstance(data, str):
        raise wrong("text", data)
    if re.search(r"\$\{\w*\}", data):
        raise Problems(((), "only secrets may come from the environment (${NAME}); write the value itself here"))
    if "\0" in data:
        raise Problems(((), "holds a NUL character"))
    return str(data)


def structure_path(data: Any, _: Any) -> Path:
    """Take the path of a file or folder; `~` is the home folder."""
    if not isinstance(data, str) or not data:
        raise wrong("a path", data)
    try:
        return expanded(structure_str(data, str))
    except RecipeError as error:
        raise Problems(((), str(error))) from None


def structure_secret(data: Any, _: Any) -> Secret:
    """Take the name of an environment variable; the message never repeats what was written."""
    found = re.fullmatch(r"\$\{([A-Za-z_]\w*)\}", data) if isinstance(data, str) else None
    if found is None:
        raise Problems(((), "give the name of an environment variable: ${NAME}"))
    return Secret(found[1])


def structure_literal(data: Any, type_: Any) -> Any:
    """Take one of the values listed."""
    for value in get_args(type_):
        if value == data and type(value) is type(str(data) if isinstance(data, str) else data):
            return value
    known = [str(value) for value in get_args(type_)]
    raise Problems(((), f"expected one of {', '.join(known)}, got {shortened(data)}{suggest(str(data), known)}"))


SCALARS: dict[Any, Any] = {
    bool: structure_bool, int: structure_int, float: structure_float, str: structure_str,
    Path: structure_path, Secret: structure_secret,
}  # fmt: skip
"""Type -> the function that makes it, called with (data, type)."""
