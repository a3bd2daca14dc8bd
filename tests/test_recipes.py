"""Recipes: a constructor call in YAML, and everything that is wrong with it in one report."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import posttrain
from posttrain.errors import RecipeError
from posttrain.recipe import dump, load
from posttrain.values import as_data

GOOD = """\
type: sft
model: {name_or_path: some/model}
data: {sources: [some/data]}
"""


def recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(textwrap.dedent(text))
    return file


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load(recipe(folder, text), overrides)
    return str(error.value).replace(f"{folder}/", "").splitlines()


def test_a_recipe_is_the_constructor_in_yaml(tmp_path: Path) -> None:
    made = load(recipe(tmp_path, GOOD + "optimizer: {lr: 1e-5}\nscheduler: linear\n"), ["optimizer.weight_decay=0.1"])
    by_hand = posttrain.SFTTrainer(
        model=posttrain.HFModel(name_or_path="some/model"),
        data=posttrain.SFTData(sources=[posttrain.Source(name_or_path="some/data")]),
        optimizer=posttrain.AdamW(lr=1e-5, weight_decay=0.1), scheduler=posttrain.Linear(),
    )  # fmt: skip
    assert as_data(made) == as_data(by_hand)


def test_the_recipe_of_the_arctictraining_blog_reads_as_written(tmp_path: Path) -> None:
    made: Any = load(recipe(tmp_path, """
        type: sft
        micro_batch_size: 2
        model:
          name_or_path: meta-llama/Llama-3.1-8B-Instruct
        data:
          sources:
            - HuggingFaceH4/ultrachat_200k
        deepspeed:
          zero_optimization:
            stage: 3
        optimizer:
          learning_rate: 1e-5
        checkpoint:
          - type: huggingface
            save_end_of_training: true
            output_dir: ./fine-tuned-model
    """))  # fmt: skip
    assert made.strategy == posttrain.DeepSpeed(config={"zero_optimization": {"stage": 3}})
    assert made.checkpoint == [posttrain.HuggingFace(output_dir=Path("./fine-tuned-model"))]
    assert made.optimizer.lr == 1e-5
    assert made.data.sources[0].name_or_path == "HuggingFaceH4/ultrachat_200k"


def test_all_mistakes_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    found = problems(tmp_path, """\
        type: sft
        micro_batchsize: 2
        model:
          name_or_path: some-model
          dtype: float8
        data:
          type: stf
          sources: [a.jsonl]
        optimizer:
          learning_rate: -1e-5
          betas: [0.9, "high"]
        scheduler: cosin
        epochs: 1.5
        overfit_first_batch: "yes"
        max_steps: 3
        max_steps: 4
    """, "seed=many", "optimizer.lrr=3")  # fmt: skip
    expected = [
        "recipe.yaml:2: micro_batchsize: SFTTrainer has no such key; did you mean 'micro_batch_size'?",
        "recipe.yaml:5: model.dtype: ",
        "recipe.yaml:7: data.type: there is no data 'stf'; did you mean 'sft'?",
        "recipe.yaml:10: optimizer.learning_rate: must be > 0, got -1e-05",
        "recipe.yaml:11: optimizer.betas.1: expected a number, got 'high'",
        "recipe.yaml:12: scheduler: there is no scheduler 'cosin'; did you mean 'cosine'?",
        "recipe.yaml:13: epochs: ",
        "recipe.yaml:14: overfit_first_batch: expected true or false, got 'yes'",
        "recipe.yaml:16: ",
        "override seed: ",
        "override optimizer.lrr: AdamW has no such key; did you mean 'lr'?",
    ]
    assert len(found) == len(expected)
    for line, begin in zip(found, expected, strict=True):
        assert line.startswith(begin)


@pytest.mark.parametrize(
    ("text", "value"),
    [("10k", 10_000), ("1_000_000", 1_000_000), ("2M", 2_000_000), ("1Ki", 1024), ("1e3", 1000), ("7", 7)],
)
def test_whole_numbers_are_written_as_people_write_them(tmp_path: Path, text: str, value: int) -> None:
    assert load(recipe(tmp_path, GOOD + f"max_steps: {text}\n")).max_steps == value


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("1.5%", 0.015), ("1", 1.0), ("5E-4", 5e-4), (".5", 0.5)])
def test_numbers_are_written_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    made: Any = load(recipe(tmp_path, GOOD + f"optimizer: {{lr: {text}}}\n"))
    assert made.optimizer.lr == value


@pytest.mark.parametrize(
    "line",
    ["max_steps: 1.9", "max_steps: true", "max_steps: '3'", "max_grad_norm: .nan", "max_grad_norm: .inf", "max_steps: 12:30",
     "overfit_first_batch: 'false'", "overfit_first_batch: no", "overfit_first_batch: 1", "output_dir: [a]", "seed: null",
     "data: {sources: a.jsonl}", "model: {name_or_path: 7}", "resume: yes", "max_steps: ${STEPS}", "log_every: 0"],
)  # fmt: skip
def test_a_value_must_mean_what_it_says(tmp_path: Path, line: str) -> None:
    key = line.split(":")[0]
    text = "\n".join(kept for kept in GOOD.splitlines() if not kept.startswith(key)) + f"\n{line}\n"
    assert len(problems(tmp_path, text)) == 1


def test_words_that_yaml_1_1_takes_for_booleans_stay_words(tmp_path: Path) -> None:
    made: Any = load(recipe(tmp_path, GOOD.replace("some/model", "no") + "output_dir: 2024-01-01\n"))
    assert (made.model.name_or_path, made.output_dir) == ("no", Path("2024-01-01"))


@pytest.mark.parametrize(
    "text",
    ["", "- a\n", "type: [", "a: &x [*x]\n", "x: !!python/object/apply:os.system ['true']\n", "[" * 3000, "type: sft\n\ttab: 1\n",
     "a: &a [1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n",
     "\x00", "? {a: b}\n: c\n", "1: 2\n"],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_with_a_message(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)


def test_missing_folders_and_odd_bytes_are_messages(tmp_path: Path) -> None:
    recipe(tmp_path, GOOD)
    (tmp_path / "latin.yaml").write_bytes(b"type: sft\nname: \xff\n")
    for path, message in (
        ("recipe.yml", "did you mean 'recipe.yaml'"),
        ("", "is a folder"),
        ("latin.yaml", "latin.yaml:2: not UTF-8"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(tmp_path / path)


KEYS = [
    "type",
    "model",
    "data",
    "optimizer",
    "checkpoint",
    "max_steps",
    "deepspeed",
    "strategy",
    "code",
    "sources",
    "lr",
    "x",
]
TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["sft", "adamw", "${X}", "10k"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.text(max_size=80)
    | TREES.map(lambda tree: yaml.safe_dump({"type": "sft", **tree} if isinstance(tree, dict) else tree))
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_and_no_tree_gives_a_traceback(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fuzzed.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load(file)
    except RecipeError as error:
        assert str(error)


@given(
    st.lists(
        st.text(alphabet="abc.=0123[]{}:", max_size=14) | st.sampled_from(["model.x=1", "data.sources.0.split=test"]),
        max_size=3,
    )
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_override_gives_a_traceback(tmp_path: Path, overrides: list[str]) -> None:
    try:
        load(recipe(tmp_path, GOOD), overrides)
    except RecipeError as error:
        assert str(error)


def test_overrides_reach_into_lists_and_say_why_they_cannot(tmp_path: Path) -> None:
    made: Any = load(recipe(tmp_path, GOOD), ["data.sources.0.split=test", "scheduler=wsd", "scheduler.decay=20%"])
    assert (made.data.sources[0].split, made.scheduler) == ("test", posttrain.WSD(decay=0.2))
    assert "counted from 0: there is no 5" in problems(tmp_path, GOOD, "data.sources.5.split=x")[0]
    assert "has the form key.subkey=value" in problems(tmp_path, GOOD, "nonsense")[0]


def test_the_resolved_recipe_can_be_run_again(tmp_path: Path) -> None:
    made = load(
        recipe(
            tmp_path, GOOD + "deepspeed: {stage: 2}\nmodel: {name_or_path: m, lora: {r: 8}}\n".replace("model: ", "#")
        )
    )
    again = load(recipe(tmp_path, dump(made)))
    assert as_data(again) == as_data(made)


# -- secrets --------------------------------------------------------------------------


def test_secrets_come_from_the_environment_and_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-123")
    made: Any = load(recipe(tmp_path, GOOD.replace("some/model}", "some/model, token: '${MY_TOKEN}'}")))
    assert made.model.token.reveal() == "canary-123"
    assert "canary-123" not in repr(made) + dump(made) + json.dumps(as_data(made))
    assert "${MY_TOKEN}" in dump(made)
    (line,) = problems(tmp_path, GOOD.replace("some/model}", "some/model, token: canary-456}"))
    assert "canary-456" not in line
    assert "name of an environment variable" in line


# -- user code ------------------------------------------------------------------------

BLOCKS = """
import torch
from posttrain import SFTTrainer, block

@block("optimizer", "{name}-sgd")
class SGD:
    lr: float
    def build(self, model):
        return torch.optim.SGD(model.parameters(), self.lr)

@block("trainer", "{name}-half")
class Half(SFTTrainer):
    scale: float = 0.5
    def loss(self, batch):
        return super().loss(batch) * self.scale
"""


def test_user_code_named_by_the_recipe_registers_blocks(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    (tmp_path / "blocks_of_mine.py").write_text(BLOCKS.format(name="mine"))
    made: Any = load(recipe(tmp_path, f"""
        code: blocks_of_mine.py
        type: mine-half
        scale: 0.25
        model: {{name_or_path: {tiny_model}}}
        data: {{sources: [{sums}]}}
        optimizer: {{type: mine-sgd, lr: 1e-3}}
        accelerator: cpu
        logger: []
        output_dir: {tmp_path}/run
        max_steps: 2
    """))  # fmt: skip
    assert (type(made).__name__, made.scale) == ("Half", 0.25)
    assert made.train().step == 2
    assert load(tmp_path / "run" / "recipe.yaml").scale == 0.25  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("broken_1", "def f(:\n", "broken_1.py:1: SyntaxError"),
        ("broken_2", "x = 1\nraise ValueError('no luck')\n", "broken_2.py:2: ValueError: no luck"),
        ("json", "x = 1\n", "rename json.py"),
    ],
)
def test_user_code_that_cannot_be_imported_is_reported_with_its_line(
    tmp_path: Path, name: str, code: str, message: str
) -> None:
    (tmp_path / f"{name}.py").write_text(code)
    assert message in problems(tmp_path, f"code: {name}.py\n{GOOD}")[0]
    assert "there is no file" in problems(tmp_path, f"code: nowhere.py\n{GOOD}")[0]


def test_code_beside_a_recipe_is_not_run_unless_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('I was run')\n")
    load(recipe(tmp_path, GOOD))


def test_validating_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"import sys; from posttrain.recipe import load; load({str(recipe(tmp_path, GOOD))!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lightning", "numpy", "datasets", "pyarrow"} & set(done.stdout.split())
