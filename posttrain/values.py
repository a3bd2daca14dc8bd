"""Blocks as plain values: what a recipe would say to make them, and what they find wrong with themselves."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from posttrain.errors import RecipeError
from posttrain.interfaces import Checked
from posttrain.registry import name_of, suggest

Key = tuple[str | int, ...]


class Secret:
    """The name of an environment variable whose value must never be written or printed.

    A recipe says `token: ${HF_TOKEN}`; the value is looked up only where it is used.

    >>> Secret("HF_TOKEN")
    Secret('${HF_TOKEN}')
    """

    def __init__(self, variable: str) -> None:
        self.variable = variable

    def reveal(self) -> str:
        """Return the value.

        Raises:
            RecipeError: the variable is not set.
        """
        try:
            return os.environ[self.variable]
        except KeyError:
            raise RecipeError(f"the environment variable {self.variable} is not set") from None

    def __repr__(self) -> str:
        return f"Secret('${{{self.variable}}}')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.variable == self.variable

    def __hash__(self) -> int:
        return hash(self.variable)


def expanded(name: str | Path) -> Path:
    """Return a path, of which `~` or `~user` at the beginning is a home folder.

    Raises:
        RecipeError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise RecipeError(f"{name}: there is no such user as {Path(name).parts[0].removeprefix('~')!r}") from None


def missing_folder(name: str) -> str | None:
    """Return what is wrong with the path of a folder that is not there; None for one that is, and for names on the hub.

    A hub name has one slash at most, and does not begin like a path.
    """
    path = expanded(name)
    if path.exists() or not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return None
    beside = [found.name for found in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"there is no folder {name}{suggest(path.name, beside)}"


def similar_folder(name: str) -> str:
    """Return "; did you mean 'runs/first'?" if something is called so beside a path that is not there; or nothing."""
    path = expanded(name)
    return suggest(str(path), map(str, path.parent.iterdir()) if path.parent.is_dir() else [])


def as_data(value: Any) -> Any:
    """Return the plain data of a recipe that makes this trainer, block or value.

    >>> from posttrain.blocks.optimizer import AdamW
    >>> as_data(AdamW(lr=1e-4))["lr"]
    0.0001
    """
    if attrs.has(type(value)):
        plain = {f.name: as_data(getattr(value, f.name)) for f in attrs.fields(type(value)) if f.init}
        name = name_of(type(value))
        return plain if name is None else {"type": name, **plain}
    if isinstance(value, list | tuple):
        return [as_data(item) for item in value]
    if isinstance(value, dict):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Secret):
        return f"${{{value.variable}}}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)


def problems(value: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield (key, message) for everything that the blocks below a value find wrong with themselves."""
    if attrs.has(type(value)):
        if isinstance(value, Checked):
            for name, message in value.check():
                yield (*key, name), message
        for field in attrs.fields(type(value)):
            if field.init:
                yield from problems(getattr(value, field.name), (*key, field.name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from problems(item, (*key, index))


def default_cache() -> Path:
    """Return where tokenized rows and the like are kept: $POSTTRAIN_CACHE, or a folder in the user's cache."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain")
