"""What is said about blocks."""

from pathlib import Path
from typing import Any, Literal

import attrs
import pytest

from posttrain.errors import RegistryError
from posttrain.interfaces import CheckpointBlock, ModelBlock, OptimizerBlock
from posttrain.recipes.explain import explain, plain_type
from posttrain.registry import KINDS, block, key, lookup, names
from posttrain.values import Secret


@attrs.frozen(kw_only=True)
class Spice:
    """What gives taste."""

    shorthand = "name"
    name: str
    """Of the plant."""


@block("callback", "test-soup")
class Soup:
    """Something warm.

    A second paragraph that
    goes on.
    """

    water: float = key(1.5, also=("liquid",))
    """In litres;
    more for guests."""
    spices: list[Spice] = attrs.field(factory=list)
    hot: bool = True


@block("callback", "test-stew")
class Stew(Soup):
    """Something thick."""

    water: float = 0.5


def test_a_block_is_described_as_a_recipe_writes_it():
    assert explain("callback", "test-soup") == (
        "callback: test-soup    (tests.test_explain.Soup)\n\n"
        "  Something warm.\n\n  A second paragraph that goes on.\n\n"
        "  water: float (default 1.5; also liquid)\n      In litres; more for guests.\n\n"
        "  spices: a list of Spices (default none)\n\n"
        "  hot: true or false (default true)\n\n"
        "Spice: text means its name; or a mapping\n\n"
        "  What gives taste.\n\n"
        "  name: text (required)\n      Of the plant."
    ).replace("tests.test_explain", __name__)


def test_the_text_under_a_field_is_inherited():
    assert "In litres" in explain("callback", "test-stew")


def test_blocks_as_defaults_go_by_the_names_of_recipes():
    found = explain("trainer", "sft")
    assert "  optimizer: an optimizer block (default adamw)\n" in found
    assert "  checkpoint: a list of checkpoint blocks (default resume, huggingface)\n" in found
    assert "  model: a model block (required; hf unless `type` says otherwise)\n" in found
    assert "  max_steps: int or null (default null; also train_iters" in found
    assert "\n  run:" not in found


def test_every_field_of_every_shipped_block_says_what_it_means():
    for kind in KINDS:
        for name in names(kind):
            if lookup(kind, name).__module__.startswith("posttrain."):
                found = explain(kind, name)
                for paragraph in found.split("\n\n"):
                    if paragraph.startswith("  ") and paragraph.rstrip().endswith(")") and ": " in paragraph:
                        assert "\n      " in paragraph, f"{kind} {name}: {paragraph} has no text"


def test_kinds_and_their_blocks_are_listed_with_a_line_each():
    everything = explain()
    assert all(kind in everything for kind in KINDS)
    found = explain("scheduler")
    assert "cosine" in found and "Half a cosine" in found and "Makes the learning-rate schedule" in found


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("optimzer", None, "did you mean 'optimizer'"),
        ("optimizer", "adam", "did you mean 'adamw'"),
        ("x", "y", "no block kind"),
    ],
)
def test_what_is_not_there_is_a_message_with_what_is(kind, name, message):
    with pytest.raises(RegistryError, match=message):
        explain(kind, name)


@pytest.mark.parametrize(
    ("type_", "words"),
    [
        (int | None, "int or null"), (Literal["a", "b"], "one of: a, b"), (list[CheckpointBlock], "a list of checkpoint blocks"),
        (list[OptimizerBlock], "a list of optimizer blocks"), (ModelBlock, "a model block"), (list[str], "a list of text"),
        (OptimizerBlock, "an optimizer block"), (tuple[float, float], "a list of 2: float, float"), (Path, "path"),
        (tuple[int, ...], "a list of ints"), (dict[str, Any], "a mapping of names to anything"), (bool, "true or false"),
        (list[Path], "a list of paths"), (str | list[str], "text or a list of text"), (Any, "anything"),
        (Secret | None, "${NAME} of an environment variable or null"), (list, "a list of anything"),
        (list[Literal["a", "b"]], "a list of one of: a, b"), (list[dict[str, int]], "a list of mappings of names to int"),
    ],
)  # fmt: skip
def test_types_are_written_in_words(type_, words):
    assert plain_type(type_) == words
