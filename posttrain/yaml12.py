"""Text <-> plain data, by the core schema of YAML 1.2.

PyYAML reads YAML 1.1, in which `on` is true, `12:30:45` is 45045 and `1e-5` is text. Only its parser is
used here; what a scalar means is decided by the table below, the same for reading and for writing.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeAlias

import yaml

from posttrain.errors import RecipeError

Key: TypeAlias = tuple[str | int, ...]
Place: TypeAlias = tuple[int, str]
"""Where something stands: a number to sort by, and the text `file:line`."""

MAX_DEPTH = 64
MAX_NODES = 100_000
"""Aliases count each time they are used: a few lines of them could otherwise stand for billions of values."""

STR, INT, FLOAT, BOOL, NULL, MERGE = (
    f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "null", "merge")
)
HUMAN = "!human"
UNITS: dict[str, int | Decimal] = {"": 1, "%": Decimal("0.01")}
UNITS |= {u: 1000**n for n, us in enumerate(("kK", "M", "GB", "T"), start=1) for u in us}
UNITS |= {f"{u}i": 1024**n for n, us in enumerate(("kK", "M", "G", "T"), start=1) for u in us}
_HUMAN = re.compile(r"([-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?)(%|[kKMGT]i?|B)?")

SCALARS = (
    (BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    (HUMAN, _HUMAN.pattern, "-+.0123456789"),
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (MERGE, r"<<", "<"),
)
"""Tag, pattern of the plain (unquoted) scalars that have it, and how those can begin."""


class Plain(str):
    """Unquoted text such as `10k` or `1_000`: a number where one is expected, text everywhere else."""

    __slots__ = ()


READERS: dict[str, Callable[[str], Any]] = {
    STR: str,
    HUMAN: Plain,
    MERGE: str,
    NULL: lambda text: None,
    BOOL: lambda text: {"true": True, "false": False}[text.lower()],
    INT: lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    FLOAT: lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
}
"""Tag -> what makes a value of a scalar that has it. Others, such as `!!python/object`, are refused."""


def number(text: str) -> int | float | None:
    """Return the number that people mean by `10k`, `1_000_000`, `1.5%` or `1Ki`; None if it is not one.

    >>> number("10k"), number("1.5%"), number("1Ki"), number("ten")
    (10000, 0.015, 1024, None)
    """
    found = _HUMAN.fullmatch(text)
    if found is None or not math.isfinite(float(found[1].replace("_", ""))):
        return None
    value = Decimal(found[1].replace("_", "")) * UNITS[found[2] or ""]
    if not math.isfinite(float(value)):
        return None
    return int(value) if value == value.to_integral_value() else float(value)


class Document:
    """What a text holds: plain data, the place of every key, and the problems met on the way."""

    def __init__(self, place: Callable[[int], Place]) -> None:
        self.place = place
        self.data: Any = None
        self.places: dict[Key, Place] = {}
        self.problems: list[tuple[Place, Key, str]] = []
        self.unreadable: set[Key] = set()
        """Keys whose value is not known because of such a problem; the data has None there."""
        self._nodes = 0
        self._above: list[yaml.Node] = []

    def add_problem(self, node: yaml.Node, key: Key, message: str) -> None:
        """Take note of a problem; reading goes on."""
        self.problems.append((self.place(node.start_mark.line + 1), key, message))

    def convert(self, node: yaml.Node, key: Key) -> Any:
        """Return the data of a node, and note the place of every key below it."""
        self._nodes += 1
        if self._nodes > MAX_NODES or len(self._above) > MAX_DEPTH:
            limit = f"more than {MAX_NODES} values" if self._nodes > MAX_NODES else f"nested more than {MAX_DEPTH} deep"
            raise RecipeError(f"{self._line(node)}: {limit}, aliases resolved")
        if any(node is parent for parent in self._above):
            raise RecipeError(f"{self._line(node)}: an alias that refers to what it is a part of")
        self.places.setdefault(key, self.place(node.start_mark.line + 1))
        self._above.append(node)
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, key)
            if node.tag not in (yaml.SafeLoader.DEFAULT_MAPPING_TAG, yaml.SafeLoader.DEFAULT_SEQUENCE_TAG):
                self._refuse_tag(node, key)
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            return [self.convert(child, (*key, i)) for i, child in enumerate(node.value)]
        finally:
            self._above.pop()

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merges = []
        for name_node, value in node.value:
            if name_node.tag == MERGE:
                merges.append(value)
                continue
            if not isinstance(name_node, yaml.ScalarNode):
                self.add_problem(name_node, key, "a key must be text, not a list or a mapping")
                continue
            name = name_node.value
            if name in data:
                first = self.places[*key, name][1]
                self.add_problem(name_node, (*key, name), f"given twice; first at {first}")
                continue
            self.places[*key, name] = self.place(name_node.start_mark.line + 1)
            data[name] = self.convert(value, (*key, name))
        for value in merges:
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self._merge(source, data, key)
        return data

    def _merge(self, source: yaml.Node, data: dict[str, Any], key: Key) -> None:
        """Add what `<<: *alias` brings; keys that are there already stay."""
        if not isinstance(source, yaml.MappingNode):
            self.add_problem(source, (*key, "<<"), "only mappings can be merged")
            return
        outer, self.places = self.places, {}
        merged = self.convert(source, key)
        inner, self.places = self.places, outer
        for name in merged.keys() - data.keys():
            data[name] = merged[name]
            self.places |= {k: place for k, place in inner.items() if k[: len(key) + 1] == (*key, name)}

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        read = READERS.get(node.tag)
        try:
            if read is not None:
                return read(node.value)
            self._refuse_tag(node, key)
        except (ValueError, KeyError):  # such as `!!int word`, or a number of thousands of digits
            self.add_problem(node, key, f"cannot be read as {node.tag.rpartition(':')[2]}: {shortened(node.value)}")
        self.unreadable.add(key)
        return None

    def _refuse_tag(self, node: yaml.Node, key: Key) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        self.add_problem(node, key, f"the tag {shortened(tag)} is not allowed; a recipe holds plain data only")

    def _line(self, node: yaml.Node) -> str:
        return self.place(node.start_mark.line + 1)[1]


def shortened(value: Any, limit: int = 60) -> str:
    """Return the repr of a value, cut to what fits on a line."""
    text = str(value).lower() if isinstance(value, bool) else repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - not shared with PyYAML's own
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - not shared with PyYAML's own

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    hidden = any(not c.isprintable() and c != "\n" for c in text)  # PyYAML would write some as line breaks
    return dumper.represent_scalar(STR, text, style='"' if hidden else "|" if "\n" in text else None)


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    flat = not any(isinstance(item, dict | list) for item in items) and len(str(items)) <= 80
    return dumper.represent_sequence(_Dumper.DEFAULT_SEQUENCE_TAG, items, flow_style=flat)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def parse(text: str, place: Callable[[int], Place]) -> Document:
    """Read one document.

    Args:
        text: YAML.
        place: line number, from 1 -> how to name it.

    Raises:
        RecipeError: it is not YAML, or it is too large. Lesser problems are in `Document.problems`.
    """
    document = Document(place)
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        where = place(text.count("\n", 0, error.position) + 1)[1]
        raise RecipeError(f"{where}: holds the character {error.character!r}, which YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{place(mark.line + 1 if mark else 1)[1]}: not valid YAML: {message}") from None
    except (ValueError, OverflowError) as error:  # PyYAML lets these out: "\UFFFFFFFF", %YAML with huge numbers
        raise RecipeError(f"{place(loader.line + 1 if loader else 1)[1]}: not valid YAML: {error}") from None
    if root is not None:
        document.data = document.convert(root, ())
    document.problems = list(dict.fromkeys(document.problems))  # an alias repeats those of its anchor
    return document


def write(data: Any) -> str:
    """Return YAML text that reads back as the same data.

    >>> print(write({"lr": 1e-05, "name": "1e-5"}), end="")
    lr: 1.0e-05
    name: '1e-5'
    """
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))
