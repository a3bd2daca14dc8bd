"""What blocks there are and what each takes, read from the classes: names, types, defaults, the text under a field."""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from posttrain import yaml12
from posttrain.errors import RegistryError
from posttrain.recipes.structure import article, kind_of
from posttrain.registry import KINDS, checked_kind, lookup, name_of, names
from posttrain.trainer import Trainer
from posttrain.values import Secret, as_data

WIDTH = 100


def explain(kind: str | None = None, name: str | None = None) -> str:
    """Describe one block, or list the blocks of a kind, or the kinds.

    Raises:
        RegistryError: there is no such kind or name.
    """
    if kind is None:
        return "\n".join([*(_summary(k) for k in KINDS), "", "posttrain blocks KIND [NAME] says more."])
    checked_kind(kind)
    return _kind(kind) if name is None else _block(kind, name)


def _summary(kind: str) -> str:
    return f"{kind:<12}{paragraphs(KINDS[kind] or Trainer)[0]}\n{'':<12}{', '.join(names(kind))}"


def _kind(kind: str) -> str:
    """Every block of a kind with the first line of its docstring."""
    width = max(map(len, names(kind)), default=0) + 2
    lines = [f"{name:<{width}}{paragraphs(lookup(kind, name))[0]}" for name in names(kind)]
    about = "\n\n".join(paragraphs(KINDS[kind] or Trainer))
    return "\n".join([kind, _indented(about), "", *(f"  {line.rstrip()}" for line in lines)])


def _block(kind: str, name: str) -> str:
    """A block the way a recipe writes it, and below it the values that its fields are made of."""
    cls = lookup(kind, name)
    parts = [f"{kind}: {name}    ({cls.__module__}.{cls.__qualname__})", _indented("\n\n".join(paragraphs(cls)))]
    parts += _fields(cls)
    described = {cls}
    while more := [t for c in list(described) for t in values_of(c) if t not in described]:
        described.add(more[0])
        short = getattr(more[0], "shorthand", None)
        parts += [f"{more[0].__name__}{f': text means its {short}; or a mapping' if short else ''}"]
        parts += [_indented("\n\n".join(paragraphs(more[0]))), *_fields(more[0])]
    return "\n\n".join(part for part in parts if part.strip())


def _fields(cls: type) -> Iterator[str]:
    for name, type_, default, text in keys(cls):
        lines = [f"  {name}: {type_} ({default})"]
        if text:
            lines.append(textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
        yield "\n".join(lines)


def keys(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type in words, default and explanation of everything that a class takes."""
    texts = {name: text for base in reversed(cls.__mro__) for name, text in _field_texts(base)}
    for field in init_fields(cls):
        also = field.metadata.get("also", ())
        more = "; ".join([_default(field), *([f"also {', '.join(also)}"] if also else [])])
        yield field.name, plain_type(field.type), more, texts.get(field.name, "")


def init_fields(cls: type) -> "list[attrs.Attribute[Any]]":
    """Return the fields that a constructor takes.

    Raises:
        RegistryError: an annotation of user code names nothing.
    """
    try:
        return [field for field in attrs.fields(attrs.resolve_types(cls)) if field.init]
    except NameError as error:  # in user code
        raise RegistryError(f"the annotations of {cls.__name__} cannot be resolved: {error}") from error


def plain_type(type_: Any) -> str:
    """Say in words what a field takes.

    >>> plain_type(int | None), plain_type(list[str]), plain_type(Literal["a", "b"])
    ('int or null', 'a list of text', 'one of: a, b')
    """
    args = get_args(type_)
    origin = get_origin(type_) or type_
    if origin in (Union, types.UnionType):
        return " or ".join([plain_type(a) for a in args if a is not type(None)] + ["null"] * (type(None) in args))
    if origin is Literal:
        return f"one of: {', '.join(map(str, args))}"
    if origin is tuple and args and args[-1] is not ...:
        return f"a list of {len(args)}: {', '.join(map(plain_type, args))}"
    if origin in (list, tuple):
        item = plain_type(args[0]) if args else "anything"
        return f"a list of {_plural(item)}"
    if origin is dict:
        return f"a mapping of names to {plain_type(args[1]) if args else 'anything'}"
    if (kind := kind_of(type_)) is not None:
        return f"{article(kind)} block"
    known: dict[Any, str] = {
        bool: "true or false",
        str: "text",
        Path: "path",
        Secret: "${NAME} of an environment variable",
        Any: "anything",
    }
    return known.get(type_) or str(getattr(type_, "__name__", type_))


def _plural(words: str) -> str:
    if words in ("text", "anything") or words.startswith("one of"):
        return words
    noun, of, rest = words.removeprefix("a ").removeprefix("an ").partition(" of ")
    return f"{noun}s{of}{rest}"


def _default(field: "attrs.Attribute[Any]") -> str:
    if block := field.metadata.get("block"):
        name = name_of(block) or block.__name__
        if field.default is None:
            return f"default none; {name} unless `type` says otherwise"
        return f"required; {name} unless `type` says otherwise" if field.default is attrs.NOTHING else f"default {name}"
    if field.default is attrs.NOTHING:
        return "required"
    made = field.default
    if isinstance(made, attrs.Factory):  # type: ignore[arg-type]
        made = f"see {field.name}" if made.takes_self else made.factory()  # type: ignore[union-attr]
    if made == []:
        return "default none"
    if isinstance(made, list) and all(name_of(type(item)) for item in made):
        return f"default {', '.join(str(name_of(type(item))) for item in made)}"
    return f"default {' '.join(yaml12.write(as_data(made)).removesuffix('...' + chr(10)).split())}"


def values_of(cls: type) -> Iterator[type]:
    """Yield the attrs classes, other than blocks, that the fields of a class are made of."""
    pending = [field.type for field in init_fields(cls)]
    while pending:
        type_ = pending.pop(0)
        pending += get_args(type_)
        if isinstance(type_, type) and attrs.has(type_) and kind_of(type_) is None:
            yield type_


def paragraphs(cls: type) -> list[str]:
    """Return the docstring, one line per paragraph; attrs writes none of its own, but Protocols inherit one."""
    doc = cls.__doc__ or ""
    return [" ".join(part.split()) for part in inspect.cleandoc(doc).split("\n\n")]


def _indented(text: str) -> str:
    parts = text.split("\n\n")
    return "\n\n".join(textwrap.fill(part, WIDTH, initial_indent="  ", subsequent_indent="  ") for part in parts)


def _field_texts(cls: type) -> Iterator[tuple[str, str]]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError):  # typed at a prompt
        return
    if not isinstance(body, ast.ClassDef):
        return
    for field, after in zip(body.body, body.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
