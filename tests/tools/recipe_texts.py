"""Recipes as texts, and a trainer with a field of every type to try them on."""

import textwrap
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest

from posttrain.errors import RecipeError
from posttrain.recipes.load import load
from posttrain.registry import block, key
from posttrain.trainers.sft import SFTTrainer
from posttrain.values import Secret

GOOD = """\
type: sft
model: {name_or_path: org/model}
data:
  sources:
    - org/dataset
"""


@attrs.frozen(kw_only=True)
class Part:
    shorthand = "name"
    name: str
    share: float = key(0.5, check=attrs.validators.in_([0.5, 1.0]))


@block("trainer", "test-fields")
class Fields(SFTTrainer):
    """A field of every type."""

    token: Secret | None = None
    parts: list[Part] = attrs.field(factory=list)
    pair: tuple[int, str] = (1, "a")
    free: dict[str, Any] = attrs.field(factory=dict)
    table: dict[str, float] = attrs.field(factory=dict)
    mode: Literal["fast", "slow", 3] = "fast"
    either: int | list[str] | None = None
    text: str = ""
    share: float = 0.0
    flag: bool = False
    anything: Any = None
    where: Path = Path("x")


@block("callback", "test-unwritable")
class Unwritable:
    tags: set[str] = attrs.field(factory=set)


def recipe(tmp_path: Path, text: str, name: str = "r.yaml") -> Path:
    file = tmp_path / name
    file.write_text(textwrap.dedent(text))
    return file


def fields(tmp_path: Path, text: str, *overrides: str) -> Any:
    return load(recipe(tmp_path, GOOD.replace("sft", "test-fields") + textwrap.dedent(text)), overrides)


def errors(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(RecipeError) as caught:
        load(recipe(tmp_path, text), overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def field_error(tmp_path: Path, text: str) -> str:
    (line,) = errors(tmp_path, GOOD.replace("sft", "test-fields") + textwrap.dedent(text))
    return line.partition(": ")[2]
