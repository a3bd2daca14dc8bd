"""Plain data -> trainer: every value checked against its field, every problem reported under its key.

Here blocks and other classes are made; what their fields hold besides is made in `containers` and `scalars`.
"""

import re
from typing import Any, TypeVar

import attrs

from posttrain import registry
from posttrain.errors import PosttrainError, RegistryError
from posttrain.interfaces import Checked
from posttrain.recipes.containers import BARE, converter, under
from posttrain.recipes.elsewhere import NAMES, meant
from posttrain.recipes.scalars import Problem, Problems, wrong
from posttrain.registry import lookup, name_of, names, suggest
from posttrain.trainer import Trainer
from posttrain.yaml12 import shortened

T = TypeVar("T")


class Override(str):
    """A key given on the command line: it replaces the same key of the recipe under any of its names."""

    __slots__ = ()


def structure(data: dict[str, Any]) -> tuple[Trainer | None, list[Problem]]:
    """Return the trainer that a recipe describes, or else everything that is wrong with it."""
    try:
        data, from_deepspeed = _expand_deepspeed(data)
    except Problems as error:
        return None, error.found
    try:
        return converter.structure(data, Trainer), []
    except Problems as error:
        if not from_deepspeed:
            return None, error.found
        inside = ("strategy", "config")
        return None, [(("deepspeed", *k[2:]) if k[:2] == inside else k, message) for k, message in error.found]


def structure_as(data: dict[str, Any], cls: type[T]) -> tuple[T | None, list[Problem]]:
    """Return the value that a recipe describes, or else everything that is wrong with it."""
    try:
        return structure_class(data, cls), []
    except Problems as error:
        return None, error.found


def _expand_deepspeed(data: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """`deepspeed: {...}` at the root is short for a strategy of that type with that config."""
    overrides = {str(key): isinstance(key, Override) for key in data}
    if "deepspeed" not in overrides:
        return data, False
    if overrides.get("strategy") == overrides["deepspeed"]:
        twice = "is short for `strategy: {type: deepspeed, config: ...}`; give only one of the two"
        raise Problems((("deepspeed",), twice))
    if overrides.get("strategy"):
        return {k: v for k, v in data.items() if k != "deepspeed"}, False
    rest = {k: v for k, v in data.items() if k not in ("deepspeed", "strategy")}
    return rest | {"strategy": {"type": "deepspeed", "config": data["deepspeed"]}}, True


def article(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def kind_of(type_: Any) -> str | None:
    """Return the kind of block that a field of this type takes, or None if it takes no block."""
    return "trainer" if type_ is Trainer else registry.kind_of(type_)


def structure_block(data: Any, protocol: Any) -> Any:
    """Make the block that `type` names."""
    kind = kind_of(protocol)
    assert kind is not None
    if isinstance(data, str):
        data = {BARE: data}
    if not isinstance(data, dict):
        raise wrong(f"a mapping with the keys of {article(kind)}", data)
    rest = {key: value for key, value in data.items() if key not in ("type", BARE)}
    name = data.get("type", data.get(BARE))
    key = ("type",) if "type" in data else ()
    if name is None:
        raise Problems(((), f"needs `type` to say which {kind} it is (known: {', '.join(names(kind))})"))
    if not isinstance(name, str):
        raise Problems(*((key, message) for _, message in wrong(f"the name of {article(kind)}", name).found))
    try:
        cls = lookup(kind, str(name))
    except RegistryError as error:
        hint = "; a folder or hub name is written as {name_or_path: ...}" if kind == "model" and not key else ""
        if name in NAMES.get(kind, {}):
            hint = f"; what others call {name!r} is here: {NAMES[kind][name]}"
        raise Problems((key, f"{error}{hint}")) from None
    except Exception as error:  # a plugin's import may fail in any way
        raise Problems((key, f"the plugin behind {kind} {name!r} cannot be imported: {error!r}")) from error
    return structure_class(rest, cls)


def structure_value(data: Any, cls: Any) -> Any:
    """Make an attrs class that a field names outright; bare text means its `shorthand` field, if it has one."""
    shorthand = getattr(cls, "shorthand", None)
    if isinstance(data, str):
        data = {BARE: data}
    if not isinstance(data, dict) or (BARE in data and shorthand is None):
        expected = f"a mapping with the keys of {cls.__name__}"
        raise wrong(expected + (f", or its {shorthand} as text" if shorthand else ""), data)
    if BARE in data:
        data = {shorthand: data[BARE], **data}
        del data[BARE]
    if (name := name_of(cls)) is not None:  # a block, but no other will do
        if data.get("type", name) != name:
            raise Problems((("type",), f"only {name!r} can stand here, got {shortened(data['type'])}"))
        data = {key: value for key, value in data.items() if key != "type"}
    return structure_class(data, cls)


def structure_class(data: dict[str, Any], cls: Any) -> Any:
    """Call a class with the keys of a mapping, after checking each of them."""
    try:
        fields = {field.name: field for field in attrs.fields(attrs.resolve_types(cls)) if field.init}
    except NameError as error:  # in user code
        raise Problems(((), f"the annotations of {cls.__name__} cannot be resolved: {error}")) from error
    spelled, found = _spellings(data, cls, fields)
    values: dict[str, Any] = {}
    draft = cls.__new__(cls)  # what validators see as `self` until all fields are known to be right
    for name, field in fields.items():
        if name in spelled:
            with under(spelled[name], found):
                values[name] = _structure_field(data[spelled[name]], field)
                object.__setattr__(draft, name, values[name])
                _validate(draft, field, values[name])
        elif field.default is attrs.NOTHING:
            found.append(((name,), f"missing; {cls.__name__} needs it"))
    if found:
        raise Problems(*found)
    try:
        made = cls(**{fields[name].alias: value for name, value in values.items()})
    except Exception as error:  # from a validator or an __attrs_post_init__ in user code
        raise Problems(((), _plainly(error, ""))) from error
    if isinstance(made, Checked):
        try:
            found = [((spelled.get(name, name),), message) for name, message in made.check()]
        except (PosttrainError, OSError, ValueError) as error:
            raise Problems(((), str(error))) from error
        if found:
            raise Problems(*found)
    return made


def _spellings(
    data: dict[str, Any], cls: Any, fields: "dict[str, attrs.Attribute[Any]]"
) -> tuple[dict[str, str], list[Problem]]:
    """Return which key of the data gives each field, and the keys that cannot."""
    spelled: dict[str, str] = {}
    found: list[Problem] = []
    called = {other: name for name, field in fields.items() for other in field.metadata.get("also", ())}
    called |= {name: name for name in fields}
    for key in data:
        name = called.get(key)
        if name is None:
            hint = f"; {elsewhere}" if (elsewhere := meant(key) or _below(key, fields)) else suggest(key, called)
            found.append(((key,), f"{cls.__name__} has no such key{hint}"))
        elif name not in spelled or isinstance(key, Override):
            spelled[name] = key
        elif not isinstance(spelled[name], Override):
            found.append(((key,), f"means the same as {spelled[name]!r}, which is given too; keep one of them"))
    return spelled, found


def _below(key: str, fields: "dict[str, attrs.Attribute[Any]]") -> str | None:
    """Return where a key belongs that stands a level too high: `max_length` is one of `data`."""
    for name, field in fields.items():
        block = field.metadata.get("block")
        if block is not None and key in {own.name for own in attrs.fields(block) if own.init}:
            return f"it belongs to {name!r}: write `{name}.{key}`, or {name}: {{{key}: ...}}"
    return None


def _structure_field(value: Any, field: "attrs.Attribute[Any]") -> Any:
    default = field.metadata.get("block")
    if default is not None and isinstance(value, dict) and not {"type", BARE} & value.keys():
        value = {"type": name_of(default), **value}
    return converter.structure(value, field.type or Any)


def _validate(draft: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    try:
        if field.validator is not None:
            field.validator(draft, field, value)
    except (ValueError, TypeError) as error:
        raise Problems(((), _plainly(error, field.name))) from None
    except AttributeError:  # it looks at a field that comes later, or is wrong itself; construction repeats it
        pass


def _plainly(error: Exception, name: str) -> str:
    """Reword what attrs' validators say: "'lr' must be > 0: -1" -> "must be > 0, got -1"."""
    text = str(error.args[0]) if error.args else repr(error)
    text = re.sub(rf"^'{re.escape(name)}' |(?<=Length) of '{re.escape(name)}'", "", text)
    return re.sub(r"^((?:Length )?must be .*?): (.*)$", r"\1, got \2", text, flags=re.DOTALL)


converter.register_structure_hook_func(lambda type_: isinstance(type_, type) and attrs.has(type_), structure_value)
converter.register_structure_hook_func(lambda type_: kind_of(type_) is not None, structure_block)
