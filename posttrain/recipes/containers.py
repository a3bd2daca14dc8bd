"""Lists, mappings and unions of a recipe -> values, each item under its own key; `converter` makes any type.

cattrs finds the hook for a type; the hooks are our own. cattrs' would turn "false" into True and 1.9
into 1, and lose the keys of all problems but the first of each level.
"""

import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Union, get_args, get_origin

import attrs
from cattrs import BaseConverter

from posttrain.recipes.scalars import SCALARS, Problem, Problems, structure_literal, structure_str, wrong
from posttrain.registry import kind_of

BARE = ""
"""Key under which a mapping holds the text it was written as: `scheduler: cosine`."""
converter = BaseConverter()


@contextmanager
def under(key: str | int, found: list[Problem]) -> Iterator[None]:
    """Collect the problems of a part under its key."""
    try:
        yield
    except Problems as error:
        found += [((key, *rest), message) for rest, message in error.found]


def structure_list(data: Any, type_: Any) -> list[Any]:
    """Make a list; a single mapping stands for a list of one where the items are blocks or values."""
    (item,) = get_args(type_) or (Any,)
    if isinstance(data, dict) and any(is_class(t) for t in (item, *get_args(item))):
        return [converter.structure(data, item)]
    return _structure_items(data, lambda index: item)


def structure_tuple(data: Any, type_: Any) -> tuple[Any, ...]:
    """Make a tuple, of a fixed length or of any."""
    items = get_args(type_) or (Any, ...)
    if len(items) == 2 and items[1] is ...:
        return tuple(_structure_items(data, lambda index: items[0]))
    if isinstance(data, list) and len(data) != len(items):
        raise Problems(((), f"expected a list of {len(items)}, got {len(data)}"))
    return tuple(_structure_items(data, lambda index: items[index]))


def _structure_items(data: Any, type_at: Callable[[int], Any]) -> list[Any]:
    if not isinstance(data, list):
        hint = f"; write [{data}]" if isinstance(data, str) and re.fullmatch(r"[\w./-]{1,40}", data) else ""
        raise Problems(((), wrong("a list", data).found[0][1] + hint))
    made: list[Any] = []
    found: list[Problem] = []
    for index, item in enumerate(data):
        with under(index, found):
            made.append(converter.structure(item, type_at(index)))
    if found:
        raise Problems(*found)
    return made


def structure_dict(data: Any, type_: Any) -> dict[str, Any]:
    """Make a dict with text keys."""
    _, item = get_args(type_) or (str, Any)
    if not isinstance(data, dict) or BARE in data:
        raise wrong("a mapping", data if not isinstance(data, dict) else data[BARE])
    made: dict[str, Any] = {}
    found: list[Problem] = []
    for key, value in data.items():
        with under(key, found):
            made[str(key)] = converter.structure(value, item)
    if found:
        raise Problems(*found)
    return made


def structure_union(data: Any, type_: Any) -> Any:
    """Take the first member that fits; if none does, report the problems of the one that comes closest."""
    members = [member for member in get_args(type_) if member is not type(None)]
    if data is None and len(members) < len(get_args(type_)):
        return None
    failures = []
    for member in members:
        try:
            return converter.structure(data, member)
        except Problems as error:
            failures.append(error)
    inside = [failure for failure in failures if any(key for key, _ in failure.found)]
    if inside or len(failures) == 1:
        raise min(inside or failures, key=lambda failure: len(failure.found))
    expected = [m.removeprefix("expected ").rpartition(", got ")[0] for f in failures for _, m in f.found]
    raise wrong(" or ".join(expected), data)


def structure_any(data: Any, _: Any) -> Any:
    """Take plain data as it is."""
    if isinstance(data, dict):
        return structure_dict(data, dict[str, Any])
    if isinstance(data, list):
        return structure_list(data, list[Any])
    return structure_str(data, str) if isinstance(data, str) else data


def structure_other(data: Any, type_: Any) -> Any:
    """Refuse what has no notation, such as a function or a tensor."""
    raise Problems(((), f"a {getattr(type_, '__name__', type_)} cannot be written in a recipe; set it from Python"))


def is_class(type_: Any) -> bool:
    """Whether a mapping makes one value of this type."""
    return kind_of(type_) is not None or (isinstance(type_, type) and attrs.has(type_))


ORIGINS: dict[Any, Any] = {
    list: structure_list, tuple: structure_tuple, dict: structure_dict, Literal: structure_literal,
    Union: structure_union, types.UnionType: structure_union,
}  # fmt: skip
"""Type, or what it is made of -> the function that makes it, called with (data, type)."""
converter.register_structure_hook_func(lambda type_: True, structure_other)  # a hook that is registered later wins
for _origin, _hook in ORIGINS.items():
    converter.register_structure_hook_func(lambda t, origin=_origin: origin in (t, get_origin(t)), _hook)  # type: ignore[misc]
for _scalar, _hook in {**SCALARS, Any: structure_any}.items():
    converter.register_structure_hook(_scalar, _hook)
