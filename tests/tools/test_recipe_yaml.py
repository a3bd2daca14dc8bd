"""The YAML of recipes: what a scalar means, and texts that are wrong or hostile."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recipe_texts import GOOD, errors, recipe

from posttrain.errors import RecipeError
from posttrain.recipes.load import load
from posttrain.yaml12 import number, parse, write


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("on", "on"), ("yes", "yes"), ("no", "no"), ("off", "off"), ("y", "y"),
        ("true", True), ("False", False), ("12:30:45", "12:30:45"), ("2024-01-01", "2024-01-01"), ("012", 12),
        ("0o17", 15), ("0x1F", 31), ("0b1", "0b1"), ("1_000", "1_000"), ("", None), ("~", None), ("null", None),
        ("'1'", "1"), ('"true"', "true"), ("'~'", "~"), ("=", "="), ("!!str 5", "5"), ("1.", 1.0), (".5", 0.5),
        ("+.inf", float("inf")), ("-.INF", float("-inf")), (".", "."), ("-", [None]), ("<<", "<<"), ("5 # five", 5),
        ("[1, [2]]", [1, [2]]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("on: 1", {"on": 1}), ("1: 2", {"1": 2}),
        ("~: 1", {"~": 1}), ("{a: &x {b: 1}, c: *x}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("{a: &x {b: 1, c: 2}, d: {<<: *x, b: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
        ("{a: &x {b: 1}, d: {<<: [*x, *x]}}", {"a": {"b": 1}, "d": {"b": 1}}),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text, meant):
    document = parse(text, lambda line: (line, str(line)))
    assert document.problems == []
    assert document.data == meant and type(document.data) in (type(meant), *type(meant).__subclasses__(), str)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (BOMB, 1, "more than 100000 values"),
        ("a: &a [*a]\n", 1, "refers to what it is a part of"),
        ("a: 1\nb: &b {c: *b}\n", 2, "refers to what it is a part of"),
        ("a: " + "[" * 2000, 1, "nested more than 64 deep"),
        ("a: " + "{a: " * 2000, 1, "nested more than 64 deep"),
        ("a: *nothing\n", 1, "undefined alias"),
        ("a: 1\n b: 2\n", 2, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: [1\nb: 2\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "single document"),
        ("a: 1\nb: \0\n", 2, "which YAML does not allow"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', 2, "not valid YAML"),
        ("a: !!python/object/apply:os.system [echo]\n", 1, "the tag '!!python/object/apply:os.system' is not allowed"),
        ("a: !mine 5\n", 1, "the tag '!mine' is not allowed"),
        ("a: !!binary aGk=\n", 1, "the tag '!!binary' is not allowed"),
        ("a: !!set {x}\n", 1, "the tag '!!set' is not allowed"),
        ("a: 1\na: !!int x\n", 2, "given twice"),
        ("b: !!int x\n", 1, "cannot be read as int"),
        ("b: !!bool maybe\n", 1, "cannot be read as bool"),
        ("? [a]\n: 1\n", 1, "a key must be text"),
        ("a: {<<: 5}\n", 1, "only mappings can be merged"),
        ("", 1, "is empty"),
        ("# nothing\n", 1, "is empty"),
        ("- a\n", 1, "does not hold keys and values"),
        ("just text", 1, "does not hold keys and values"),
    ],
)
def test_yaml_that_is_wrong_or_hostile_is_a_message_with_a_line(tmp_path, text, line, message):
    began = time.process_time()
    found = errors(tmp_path, text)
    assert any(f"r.yaml:{line}: " in entry and message in entry for entry in found), found
    assert time.process_time() - began < 5


def test_files_that_are_no_recipes_are_messages(tmp_path):
    def message(path: Path) -> str:
        with pytest.raises(RecipeError) as caught:
            load(path)
        return str(caught.value)

    recipe(tmp_path, GOOD, "sft.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"type: sft\nmodel: caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"a" * 2_000_000)
    assert message(tmp_path / "stf.yaml").endswith("no such file; did you mean 'sft.yaml'?")
    assert message(tmp_path / "no" / "x.yaml").endswith("no such file")
    assert message(tmp_path).endswith("is a folder, not a recipe")
    assert "latin.yaml:2: not UTF-8: byte 0xe9" in message(tmp_path / "latin.yaml")
    assert "holds 2,000,000 bytes" in message(tmp_path / "large.yaml")
    assert "cannot be read" in message(Path("nul\0"))


def test_a_byte_order_mark_and_windows_lines_do_not_matter(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load(tmp_path / "r.yaml").model.name_or_path == "org/model"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
@settings(max_examples=200, deadline=None)
@example({"a": "1e5\n"})
@example("\n x")
def test_what_is_written_reads_back_the_same(data):
    document = parse(write(data), lambda line: (line, ""))
    assert document.problems == []
    assert document.data == data


def test_numbers_are_exact():
    assert [number(t) for t in ("0.1k", "1.1M", "7%", "-2k", "1e2k", "x", "1e400", "1e-400")] == [
        100, 1_100_000, 0.07, -2000, 100_000, None, None, 0,
    ]  # fmt: skip
    assert re.fullmatch(r"\d+", str(number("1e300")))
