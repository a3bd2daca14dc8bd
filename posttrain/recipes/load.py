"""YAML recipe -> trainer. All problems of a recipe are reported at once, each with its line."""

import copy
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from posttrain import yaml12
from posttrain.errors import RecipeError
from posttrain.recipes.containers import BARE
from posttrain.recipes.scalars import Problem
from posttrain.recipes.structure import Override, structure
from posttrain.registry import suggest
from posttrain.trainer import Trainer
from posttrain.values import as_data, expanded
from posttrain.words import counted
from posttrain.yaml12 import Document, Key, Place, shortened

MAX_BYTES = 1_000_000
AFTER_ALL_LINES = 10**9
T = TypeVar("T")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Trainer:
    """Read a recipe, apply overrides, import its `code`, and make the trainer.

    Args:
        path: a YAML file.
        overrides: `key.subkey=value`, with the value written as in YAML; `data.sources.0.split=test`
            reaches into a list.

    Raises:
        RecipeError: with a line `file:line: key: what is wrong` for every problem there is.

    >>> load("recipe.yaml", ["optimizer.lr=1e-4"])  # doctest: +SKIP
    """
    return load_as(structure, Path(path), overrides, "`type: sft`, then `model:`, `data:` and what differs")


def load_as(
    make: Callable[[dict[str, Any]], tuple[T | None, list[Problem]]], path: Path, overrides: Iterable[str], begins: str
) -> T:
    """Return what `make` makes of the recipe in a file; `begins` says how such a recipe begins. See `load`."""
    document = yaml12.parse(read(path), lambda line: (line, f"{path}:{line}"))
    if not isinstance(document.data, dict):
        what = "is empty" if document.data is None else "does not hold keys and values"
        raise RecipeError(f"{path}:1: {what}; a recipe begins with {begins}")
    numbered = [(AFTER_ALL_LINES + index, text) for index, text in enumerate(overrides)]
    first, later = ([pair for pair in numbered if pair[1].startswith("code") == early] for early in (True, False))
    for order, text in first:
        _set_override(document, text, order)
    made, cause, readable = None, None, True
    try:
        _import_code(document.data, path.parent)
    except RecipeError as error:  # without that code, types would seem unknown: look no further
        document.problems.append((_place(document, ("code",)), ("code",), str(error)))
        cause, readable = error.__cause__, False
    for order, text in later:
        _set_override(document, text, order, make if readable else None)
    if readable:
        made, found = make(document.data)
        known = document.unreadable
        document.problems += [(_place(document, key), key, message) for key, message in found if key not in known]
    if made is None or document.problems:
        found_in_order = sorted(document.problems, key=lambda problem: problem[0][0])
        raise RecipeError("\n".join(_line(*problem) for problem in found_in_order)) from cause
    return made


def dump(trainer: Trainer) -> str:
    """Return the resolved recipe: every key with its value, as YAML that `load` reads back."""
    data = as_data(trainer)
    return yaml12.write({name: data[name] for name in ("type", "model", "data")} | data)


def read(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        RecipeError: there is no such file, or it cannot be a recipe.
    """
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, not a recipe")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: holds {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}")
        content = path.read_bytes()
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such file{suggest(path.name, beside)}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8: byte {content[error.start]:#04x}") from None


# -- overrides ------------------------------------------------------------------------


Make: TypeAlias = Callable[[dict[str, Any]], tuple[Any, list[Problem]]]


class _Unknown(Exception):
    """What a default is cannot be told, because of problems that are reported anyway."""


def _set_override(document: Document, text: str, order: int, make: Make | None = None) -> None:
    """Put the value of `key.subkey=value` where it belongs, or take note of why that cannot be done.

    `make` makes what the recipe describes, to find the default of a list that the override reaches into.
    """
    dotted, equals, value = text.partition("=")
    place: Place = (order, f"override {dotted}")  # never the value: it may be a secret
    if not equals or not all(dotted.split(".")):
        document.problems.append((place, (), "an override has the form key.subkey=value"))
        return
    try:
        given = yaml12.parse(value, lambda line: place)
        parent, last, key = _walk(document.data, dotted.split("."), lambda key: _default(document.data, key, make))
    except RecipeError as error:
        document.problems.append((place, (), str(error).removeprefix(f"{place[1]}: ")))
        return
    except _Unknown:
        return
    document.problems += [(where, key + below, message) for where, below, message in given.problems]
    document.unreadable |= {key + below for below in given.unreadable}
    document.places = {k: p for k, p in document.places.items() if k[: len(key)] != key}
    for depth in range(1, len(key)):
        document.places.setdefault(key[:depth], place)  # a mapping that this override made
    document.places[key] = place
    if isinstance(parent, dict):
        parent.pop(last, None)
        last = Override(last)
    parent[last] = given.data


def _default(data: dict[str, Any], key: Key, make: Make | None) -> Any:
    """Return the value that the resolved recipe has at a key, as plain data; None if there is no such key."""
    made = make(copy.deepcopy(data))[0] if make is not None else None
    if made is None:
        raise _Unknown
    found = as_data(made)
    for part in key:
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _walk(data: Any, parts: list[str], default: Callable[[Key], Any]) -> tuple[Any, Any, Key]:
    """Return the mapping or list that holds what a path names, the name in it, and the whole key."""
    key: tuple[str | int, ...] = ()
    for part, following in pairwise(parts):
        step = _step(data, part, key)
        if isinstance(data, dict):
            known = data.get(step)
            if known is None and following.isdecimal() and isinstance(usual := default((*key, step)), list):
                data[step] = known = usual  # `checkpoint.0.every=2`, where the recipe names no checkpoint
            if known is None or isinstance(known, str):  # `scheduler: cosine` with `scheduler.warmup=0.1`
                data[step] = {} if known is None else {BARE: known}
        elif isinstance(data[step], str):
            data[step] = {BARE: data[step]}
        data, key = data[step], (*key, step)
    last = _step(data, parts[-1], key)
    return data, last, (*key, last)


def _step(data: Any, part: str, key: Key) -> str | int:
    """Return one part of a path as what it means there: a key, or the index of a list."""
    here = ".".join(map(str, key))
    if isinstance(data, dict):
        if part.isdigit() and part not in data:
            raise RecipeError(f"{here or 'the recipe'} is not a list here: there is no entry {part} to set")
        return part
    if not isinstance(data, list):
        raise RecipeError(f"{here} is {shortened(data)}, which has no keys")
    if not part.isdecimal() or len(part) > 9:
        raise RecipeError(f"{here} is a list: say which entry, such as {here}.0.{part}")
    if int(part) >= len(data):
        raise RecipeError(f"{here} has {counted(len(data), 'value')}, counted from 0: there is no {part}")
    return int(part)


# -- user code ------------------------------------------------------------------------


def _import_code(data: dict[str, Any], folder: Path) -> None:
    """Import what `code` names, so that its blocks get registered; leave absolute paths in its place."""
    files = data.get("code", [])
    files = files if isinstance(files, list) else [files]
    if not all(isinstance(file, str) and "\0" not in file for file in files):
        return  # `structure` says what is wrong
    try:
        resolved = [(folder / expanded(file)).absolute() for file in files]
        for file in resolved:
            import_file(file)
    except (OSError, RuntimeError) as error:  # a name too long, the home of nobody
        raise RecipeError(str(error)) from error
    if resolved:
        data["code"] = [str(file) for file in resolved]


def import_file(file: Path) -> None:
    """Import a file as a module of its own name, which worker processes can do too.

    Raises:
        RecipeError: it is not there, has no name for a module, or fails.
    """
    module = file.stem
    if not file.is_file():
        raise RecipeError(f"there is no file {file}")
    if file.suffix != ".py" or not module.isidentifier():
        raise RecipeError(f"{file.name} cannot be imported: give it a name like my_blocks.py")
    loaded = sys.modules.get(module)
    if module in sys.stdlib_module_names or (loaded and not _is_from(loaded, file)):
        other = getattr(loaded, "__file__", None) or "in the standard library"
        raise RecipeError(f"a module {module!r} exists already ({other}): rename {file.name}")
    if str(file.parent) not in sys.path:  # worker processes inherit sys.path
        sys.path.insert(0, str(file.parent))
    importlib.invalidate_caches()
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{_scene(error, file)}: {type(error).__name__}: {error}") from error
    if not _is_from(loaded, file):
        raise RecipeError(f"a module {module!r} exists already ({loaded.__file__}): rename {file.name}")


def _is_from(module: Any, file: Path) -> bool:
    return Path(getattr(module, "__file__", None) or "").resolve() == file.resolve()


def _scene(error: BaseException, file: Path) -> str:
    """Say where in the user's code an exception came from: the last of its own lines that was reached."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == file.parent]
    return f"{lines[-1].filename}:{lines[-1].lineno}" if lines else str(file)


# -- messages -------------------------------------------------------------------------


def _place(document: Document, key: Key) -> Place:
    """Return where a key stands, or the closest key above it."""
    while key and key not in document.places:
        key = key[:-1]
    return document.places.get(key, document.place(1))


def _line(place: Place, key: Key, message: str) -> str:
    dotted = ".".join(map(str, key))
    named = "" if place[1] == f"override {dotted}" or not dotted else f"{dotted}: "
    return f"{place[1]}: {named}{message}"
