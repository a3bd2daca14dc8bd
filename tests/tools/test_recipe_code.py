"""Recipes with the user's own code."""

import sys

import pytest
from recipe_texts import GOOD, errors, recipe

from posttrain import registry
from posttrain.errors import RecipeError, RegistryError
from posttrain.recipes.explain import explain
from posttrain.recipes.load import dump, load
from posttrain.registry import block, key
from posttrain.values import as_data


@pytest.fixture
def clean_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith("my_"):
            del sys.modules[name]


def test_a_trainer_of_ones_own_adds_keys(tmp_path, clean_imports):
    recipe(
        tmp_path,
        """\
        from posttrain import SFTTrainer, block, key

        @block("trainer", "test-half")
        class Half(SFTTrainer):
            scale: float = key(0.5, check=lambda self, field, value: None)
        """,
        "my_half.py",
    )
    file = recipe(tmp_path, GOOD.replace("type: sft", "code: my_half.py\ntype: test-half\nscale: 25%"))
    trainer = load(file)
    assert type(trainer).__name__ == "Half" and trainer.scale == 0.25
    assert trainer.code == [tmp_path / "my_half.py"]
    assert type(trainer).__module__ == "my_half" and sys.modules["my_half"].Half is type(trainer)
    again = load(recipe(tmp_path / "..", dump(trainer), "again.yaml"))
    assert as_data(again) == as_data(trainer)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("my_missing.py", None, "code: there is no file"),
        ("~nobody-of-this-name/my_x.py", None, "there is no such user as"),
        ("a" * 300 + ".py", None, "File name too long"),
        ("json.py", "", "a module 'json' exists already"),
        ("attrs.py", "", "rename attrs.py"),
        ("my-code.py", "", "give it a name like my_blocks.py"),
        ("my_syntax.py", "x = 1\ny = = 2\n", "my_syntax.py:2: SyntaxError"),
        ("my_bug.py", "def f():\n    return nothing\n\nf()\n", "my_bug.py:2: NameError: name 'nothing' is not defined"),
        ("my_import.py", "import no_such_thing\n", "my_import.py:1: ModuleNotFoundError"),
        ("my_exit.py", "import sys\nsys.exit(3)\n", "my_exit.py:2: SystemExit: 3"),
        (
            "my_unfit.py",
            "from posttrain import block\n@block('optimizer', 'test-unfit')\nclass A:\n    pass\n",
            "my_unfit.py:2: RegistryError: A (",
        ),
        (
            "my_taken.py",
            "from posttrain import block\n@block('optimizer', 'adamw')\nclass A:\n    def build(self, model): ...\n",
            "is already registered by AdamW",
        ),
    ],
)
def test_code_that_cannot_be_imported_is_a_message(tmp_path, clean_imports, name, code, message):
    if code is not None:
        (tmp_path / name).write_text(code)
    found = errors(tmp_path, f"code: {name}\n{GOOD}seed: 1\nseed: 2\n")
    assert found[0].startswith("r.yaml:1: code: ") and message in found[0]
    assert found[-1].startswith("r.yaml:8: seed: given twice")


def test_the_traceback_of_user_code_stays_chained(tmp_path, clean_imports):
    (tmp_path / "my_chained.py").write_text("1 / 0\n")
    with pytest.raises(RecipeError) as caught:
        load(recipe(tmp_path, f"code: my_chained.py\n{GOOD}"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_run_of_user_code_writes_a_recipe_that_runs_again(tmp_path, clean_imports, tiny_model, sums):
    recipe(
        tmp_path,
        """\
        import torch
        from posttrain import SFTTrainer, block

        @block("optimizer", "test-sgd")
        class SGD:
            lr: float
            def build(self, model):
                return torch.optim.SGD(model.parameters(), self.lr)

        @block("trainer", "test-scaled")
        class Scaled(SFTTrainer):
            scale: float = 0.5
            def loss(self, batch):
                return super().loss(batch) * self.scale
        """,
        "my_method.py",
    )
    text = f"""\
        code: my_method.py
        type: test-scaled
        scale: 0.25
        model: {{name_or_path: {tiny_model}, revision: "1e5"}}
        data: {{sources: [{sums}]}}
        optimizer: {{type: test-sgd, lr: 1e-3}}
        accelerator: cpu
        logger: []
        checkpoint: []
        output_dir: {tmp_path}/run
        max_steps: 2
        """
    assert load(recipe(tmp_path, text)).train().step == 2
    again = load(tmp_path / "run" / "recipe.yaml")
    assert (again.scale, again.model.revision) == (0.25, "1e5")


def test_code_beside_a_recipe_is_not_run_unless_it_is_named(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('I was run')\n")
    load(recipe(tmp_path, GOOD))


def test_code_must_name_files(tmp_path):
    assert errors(tmp_path, f"code: 5\n{GOOD}") == ["r.yaml:1: code: expected a list, got 5"]
    assert errors(tmp_path, f"code: [5]\n{GOOD}") == ["r.yaml:1: code.0: expected a path, got 5"]


def test_annotations_that_cannot_be_resolved_are_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_blocks", dict(registry._blocks))  # others list all blocks

    @block("callback", "test-unresolved")
    class Unresolved:
        x: "Nowhere" = 1  # type: ignore[name-defined]  # noqa: F821

    found = errors(tmp_path, GOOD + "callbacks: [test-unresolved]\n")
    assert found == [
        "r.yaml:6: callbacks.0: the annotations of Unresolved cannot be resolved: name 'Nowhere' is not defined"
    ]
    with pytest.raises(RegistryError, match="cannot be resolved: name 'Nowhere' is not defined"):
        explain("callback", "test-unresolved")


def test_validators_may_look_at_other_fields(tmp_path):
    @block("callback", "test-range")
    class Range:
        low: int = 0
        high: int = key(1, check=lambda self, field, value: _above(self.low, value))

    def _above(low: int, high: int) -> None:
        if high <= low:
            raise ValueError(f"must be above low, got {high}")

    assert errors(tmp_path, GOOD + "callbacks: [{type: test-range, low: 3, high: 2}]\n") == [
        "r.yaml:6: callbacks.0.high: must be above low, got 2"
    ]
    assert errors(tmp_path, GOOD + "callbacks: [{type: test-range, low: 3}]\n") == [
        "r.yaml:6: callbacks.0: must be above low, got 1"
    ]
