"""Whatever a recipe holds, it is a trainer or an error that says why."""

import time
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from recipe_texts import GOOD

from posttrain.errors import RecipeError
from posttrain.recipes.load import load
from posttrain.yaml12 import write

KEYS = [
    "type", "model", "data", "sources", "optimizer", "lr", "learning_rate", "scheduler",
    "checkpoint", "every", "deepspeed", "strategy", "config", "name_or_path", "seed", "max_steps",
    "devices", "precision", "logger", "code", "callbacks", "betas", "eval_split", "token",
    "columns", "weight", "<<", "run", "output_dir", "parts", "",
]  # fmt: skip
VALUES = [
    "sft", "test-fields", "adamw", "cosine", "resume", "10k", "5%", "${X}", "~", "org/data", "auto", "", "\0", "a" * 300,
]  # fmt: skip
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(VALUES) | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)
roots = st.dictionaries(st.sampled_from(KEYS), trees, max_size=8).map(lambda tree: {"type": "test-fields", **tree})
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(file: Path, content: bytes, overrides: tuple[str, ...] = ()) -> None:
    file.write_bytes(content)
    began = time.process_time()
    try:
        load(file, overrides)
    except RecipeError as error:
        assert str(error).strip()
    assert time.process_time() - began < 5


@given(text=st.text(max_size=200) | st.text(alphabet="ab:-[]{},&*!|>'\"#%@`? \n\t<~01.", max_size=60))
@FUZZ
@example(text="%YAML 1.99999999999999999999999\n---\na: 1")
@example(text="a: !<tag:yaml.org,2002:int> _")
def test_any_text_is_a_recipe_or_an_error_that_says_why(tmp_path, text):
    survives(tmp_path / "r.yaml", text.encode(errors="surrogatepass"))


@given(content=st.binary(max_size=100))
@FUZZ
def test_any_bytes_are_a_recipe_or_an_error_that_says_why(tmp_path, content):
    survives(tmp_path / "r.yaml", content)


@given(tree=roots)
@FUZZ
def test_any_tree_of_known_keys_is_a_recipe_or_an_error_that_says_why(tmp_path, tree):
    survives(tmp_path / "r.yaml", write(tree).encode(errors="replace"))


@given(data=st.data())
@FUZZ
def test_a_good_recipe_that_was_damaged_is_an_error_that_says_why(tmp_path, data):
    text = GOOD + "optimizer: {lr: 1e-5}\ncheckpoint: [{type: resume, every: 5}]\nseed: 5\n"
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text = (
            text[:at]
            + data.draw(st.text(alphabet="a:-[]{}&*!'\" \n0~", max_size=3))
            + text[at + data.draw(st.integers(0, 3)) :]
        )
    survives(tmp_path / "r.yaml", text.encode())


@given(
    path=st.lists(st.sampled_from([*KEYS, "0", "1", "-1"]), min_size=1, max_size=4),
    value=trees.map(write) | st.text(max_size=9),
)
@FUZZ
def test_any_override_works_or_is_an_error_that_says_why(tmp_path, path, value):
    survives(tmp_path / "r.yaml", GOOD.encode(), (f"{'.'.join(path)}={value}",))
