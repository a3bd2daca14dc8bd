"""What can be imported from posttrain."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain
import posttrain.synth
from posttrain.registry import KINDS, lookup, names


def test_every_public_name_is_there_and_the_list_is_sorted():
    assert posttrain.__all__ == sorted(posttrain.__all__)
    assert len(set(posttrain.__all__)) == len(posttrain.__all__)
    for name in posttrain.__all__:
        assert getattr(posttrain, name) is not None
    assert set(posttrain.__all__) <= set(dir(posttrain))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(posttrain.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name for node in block.body for alias in node.names}
    assert seen == set(posttrain.__all__)


def test_every_shipped_block_is_public():
    shipped = {lookup(kind, name) for kind in KINDS for name in names(kind)}
    ours = {cls.__name__ for cls in shipped if cls.__module__.startswith("posttrain.")}
    assert not ours - set(posttrain.__all__) - set(posttrain.synth.__all__)  # steps are at home in posttrain.synth


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'posttrain' has no attribute 'Nothing'"):
        posttrain.Nothing  # noqa: B018


def test_importing_posttrain_imports_nothing_heavy():
    code = "import sys, posttrain; print(sorted(m for m in sys.modules if m.partition('.')[0] in ('attrs', 'yaml', 'torch')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
