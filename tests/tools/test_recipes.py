"""Recipes: what they mean, and what is said about wrong ones."""

import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import posttrain
from posttrain import registry
from posttrain.blocks.data.sources import Source
from posttrain.blocks.models.lora import LoRA
from posttrain.errors import RecipeError, RegistryError
from posttrain.recipes.elsewhere import ELSEWHERE
from posttrain.recipes.explain import explain, init_fields
from posttrain.recipes.load import dump, load
from posttrain.recipes.structure import kind_of
from posttrain.registry import block, key
from posttrain.trainers.sft import SFTTrainer
from posttrain.values import Secret, as_data
from posttrain.yaml12 import number, parse, write

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


# -- all problems at once -------------------------------------------------------------


def test_every_mistake_is_reported_in_one_go_with_its_line(tmp_path):
    found = errors(
        tmp_path,
        """\
        type: sft
        model: {name_or_path: tiny, dtpe: float32}
        data:
          sources: org/dataset
          max_length: -5
        optimizer:
          learning_rate: fast
          betas: [0.9]
        scheduler: cosin
        seed: true
        seed: 3
        epochs: 0
        deepspeed: {a: "${HOME}"}
        checkpoint: {every: 5}
        precision: bf16-mixd
        trian: 1
        """,
        "optimizer.eps=x",
        "nonsense",
        "model.0.dtype=float32",
    )
    assert found == [
        "r.yaml:2: model.dtpe: HFModel has no such key; did you mean 'dtype'?",
        "r.yaml:4: data.sources: expected a list, got 'org/dataset'; write [org/dataset]",
        "r.yaml:5: data.max_length: must be > 1, got -5",
        "r.yaml:7: optimizer.learning_rate: expected a number, got 'fast'",
        "r.yaml:8: optimizer.betas: expected a list of 2, got 1",
        "r.yaml:9: scheduler: there is no scheduler 'cosin'; did you mean 'cosine'? "
        "(known: constant, cosine, linear, two-stage, wsd)",
        "r.yaml:10: seed: expected a whole number, got true",
        "r.yaml:11: seed: given twice; first at r.yaml:10",
        "r.yaml:12: epochs: must be > 0, got 0.0",
        "r.yaml:13: deepspeed.a: only secrets may come from the environment (${NAME}); write the value itself here",
        "r.yaml:14: checkpoint: needs `type` to say which checkpoint it is (known: huggingface, resume)",
        "r.yaml:15: precision: expected one of 32-true, bf16-mixed, bf16-true, 16-mixed, 64-true, bf16, fp16, fp32, "
        "got 'bf16-mixd'; "
        "did you mean 'bf16-mixed'?",
        "r.yaml:16: trian: SFTTrainer has no such key" + found[12].partition("no such key")[2],
        "override optimizer.eps: expected a number, got 'x'",
        "override nonsense: an override has the form key.subkey=value",
        "override model.0.dtype: model is not a list here: there is no entry 0 to set",
    ]


def test_what_is_missing_is_named(tmp_path):
    assert errors(tmp_path, "type: sft\nmodel: {}\n") == [
        "r.yaml:1: data: missing; SFTTrainer needs it",
        "r.yaml:2: model.name_or_path: missing; HFModel needs it",
    ]
    assert "needs `type` to say which trainer it is" in errors(tmp_path, "model: x\n")[0]


def test_blocks_check_themselves_while_others_are_still_wrong(tmp_path):
    found = errors(tmp_path, GOOD + "  eval_split: 10%\n  eval_sources: [org/other]\nseed: x\n")
    assert found == [
        "r.yaml:6: data.eval_split: holds out rows of `sources`, but `eval_sources` is given too; choose one",
        "r.yaml:8: seed: expected a whole number, got 'x'",
    ]


# -- what a recipe can say ------------------------------------------------------------


def test_a_recipe_is_the_constructor_in_yaml(tmp_path):
    made = load(recipe(tmp_path, GOOD + "optimizer: {lr: 1e-5}\nscheduler: linear\n"), ["optimizer.weight_decay=0.1"])
    by_hand = posttrain.SFTTrainer(
        model=posttrain.HFModel(name_or_path="org/model"),
        data=posttrain.SFTData(sources=[posttrain.Source(name_or_path="org/dataset")]),
        optimizer=posttrain.AdamW(lr=1e-5, weight_decay=0.1), scheduler=posttrain.Linear(),
    )  # fmt: skip
    assert as_data(made) == as_data(by_hand)


def test_the_recipe_of_arctic_trainings_blog_reads_naturally(tmp_path):
    trainer = load(
        recipe(
            tmp_path,
            """\
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
              learning_rate: 2e-5
            checkpoint:
              - type: huggingface
                save_end_of_training: true
                output_dir: ./out
            """,
        )
    )
    data = as_data(trainer)
    assert data["data"]["sources"][0]["name_or_path"] == "HuggingFaceH4/ultrachat_200k"
    assert data["strategy"]["type"] == "deepspeed"
    assert data["strategy"]["config"] == {"zero_optimization": {"stage": 3}}
    assert data["optimizer"]["lr"] == 2e-5
    assert [(c["type"], c["at_end"], c["output_dir"]) for c in data["checkpoint"]] == [("huggingface", True, "out")]


@pytest.mark.parametrize(
    ("written", "meant"),
    [("10k", 10_000), ("1_000_000", 1_000_000), ("1Ki", 1024), ("2M", 2_000_000), ("1.5k", 1500), ("1e3", 1000),
     ("0x10", 16), ("012", 12), ("+3", 3), ("100%", 1), ("1B", 10**9), ("3Mi", 3 * 2**20)],
)  # fmt: skip
def test_whole_numbers_can_be_written_as_people_write_them(tmp_path, written, meant):
    found = load(recipe(tmp_path, GOOD + f"max_steps: {written}\n")).max_steps
    assert found == meant and type(found) is int


@pytest.mark.parametrize(
    ("written", "meant"), [("1e-5", 1e-5), ("1.5%", 0.015), ("3", 3.0), (".5", 0.5), ("2k", 2000.0)]
)
def test_numbers_can_be_written_as_people_write_them(tmp_path, written, meant):
    found = load(recipe(tmp_path, GOOD + f"optimizer: {{eps: {written}}}\n")).optimizer.eps
    assert found == meant and type(found) is float


def test_human_numbers_stay_text_where_text_is_expected(tmp_path):
    made = fields(tmp_path, "text: 10k\nfree: {a: 3B, b: [1e-5, 7]}\nanything: 5%\n")
    assert (made.text, made.free, made.anything) == ("10k", {"a": "3B", "b": [1e-5, 7]}, "5%")
    assert type(made.text) is type(made.free["a"]) is type(made.anything) is str


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seed: "5"', "seed: expected a whole number, got '5'"),
        ('share: "1e-5"', "share: expected a number, got '1e-5'"),
        ("seed: 1.9", "seed: expected a whole number, got 1.9"),
        ("seed: 1.5k1", "seed: expected a whole number, got '1.5k1'"),
        ("seed: true", "seed: expected a whole number, got true"),
        ("seed: .inf", "seed: expected a whole number, got inf"),
        ("share: true", "share: expected a number, got true"),
        ("share: .nan", "share: expected a finite number, got nan"),
        ("share: 1e999", "share: expected a finite number, got inf"),
        ("share: " + "9" * 400, "share: expected a finite number, got 9"),
        ("share: 9e307k", "share: expected a number, got '9e307k'"),
        ("seed: " + "9" * 5000, "seed: cannot be read as int: '9999"),
        ('flag: "false"', "flag: expected true or false, got 'false'"),
        ("flag: no", "flag: expected true or false, got 'no'"),
        ("flag: 0", "flag: expected true or false, got 0"),
        ("text: 5", "text: expected text, got 5"),
        ("text: null", "text: expected text, got null"),
        ("text: [a]", "text: expected text, got a list"),
        ("text: {a: b}", "text: expected text, got a mapping"),
        ('text: "a\\0b"', "text: holds a NUL character"),
        ('where: ""', "where: expected a path, got ''"),
        ("where: 7", "where: expected a path, got 7"),
        ("parts: some", "parts: expected a list, got 'some'; write [some]"),
        ("parts: [{name: 5}]", "parts.0.name: expected text, got 5"),
        ("parts: {name: a, shares: 1}", "parts.shares: Part has no such key; did you mean 'share'?"),
        ("parts: {name: a, share: 0.7}", "parts.share: must be in [0.5, 1.0] (got 0.7)"),
        ("parts: [3]", "parts.0: expected a mapping with the keys of Part, or its name as text, got 3"),
        ("pair: [1]", "pair: expected a list of 2, got 1"),
        ("pair: [1, 2]", "pair.1: expected text, got 2"),
        ("table: {a: x}", "table.a: expected a number, got 'x'"),
        ("table: [1]", "table: expected a mapping, got a list"),
        ("mode: fsat", "mode: expected one of fast, slow, 3, got 'fsat'; did you mean 'fast'?"),
        ('mode: "3"', "mode: expected one of fast, slow, 3, got '3'"),
        ("mode: 3.0", "mode: expected one of fast, slow, 3, got 3.0"),
        ("either: x", "either: expected a whole number or a list, got 'x'"),
        ("either: [1]", "either.0: expected text, got 1"),
        ("optimizer: 5", "optimizer: expected a mapping with the keys of an optimizer, got 5"),
        ("optimizer: {type: 5}", "optimizer.type: expected the name of an optimizer, got 5"),
        ("optimizer: {type: adam}", "optimizer.type: there is no optimizer 'adam'; did you mean 'adamw'?"),
        ("optimizer: {lr: 1, learning_rate: 2}", "optimizer.learning_rate: means the same as 'lr', which is given too"),
        ("text: ${HOME}/x", "text: only secrets may come from the environment"),
        ("where: ${HOME}/x", "where: only secrets may come from the environment"),
        ("free: {a: [{b: '${HOME}'}]}", "free.a.0.b: only secrets may come from the environment"),
        ("deepspeed: 5", "deepspeed: expected a mapping, got 5"),
        ("deepspeed: {}\nstrategy: ddp", "deepspeed: is short for `strategy: {type: deepspeed, config: ...}`"),
        ("callbacks: {type: test-unwritable, tags: [a]}", "tags: a set cannot be written in a recipe; set"),
        ("run: 5", "run: Fields has no such key"),
    ],
)  # fmt: skip
def test_a_value_must_mean_what_it_says(tmp_path, text, message):
    assert message in field_error(tmp_path, text + "\n")


def test_values_that_are_right_arrive_as_they_are(tmp_path):
    made = fields(
        tmp_path,
        """\
        parts: {name: a, share: 1}
        pair: [2, b]
        table: {a: 1, b: 5%}
        mode: 3
        either: [x, y]
        where: ~/runs
        token: ${HF_TOKEN}
        scheduler: linear
        """,
    )
    assert made.parts == [Part(name="a", share=1.0)]
    assert (made.pair, made.table, made.mode, made.either) == ((2, "b"), {"a": 1.0, "b": 0.05}, 3, ["x", "y"])
    assert made.where == Path.home() / "runs"
    assert made.token == Secret("HF_TOKEN")
    assert as_data(made.scheduler)["type"] == "linear"
    assert fields(tmp_path, "parts: [a, {name: b}]\n").parts == [Part(name="a"), Part(name="b")]


# -- keys of other libraries ----------------------------------------------------------


def paths(ours: str) -> list[list[str]]:
    """The keys that a table's right side names in backticks, cut at the dots."""
    return [found[1].split(".") for found in re.finditer(r"`([a-z_]+(?:\\.[a-z_]+)*)(?:: [^`]*)?`", ours)]


def exists(path: list[str], classes: set[type]) -> bool:
    """Whether a key leads somewhere from some classes, through the blocks and values that their fields may hold."""
    fields = [f for cls in classes for f in init_fields(cls) if path[0] in (f.name, "type")]
    if len(path) == 1 or not fields:
        return bool(fields)
    types: set[type] = set()
    pending: list[Any] = [field.type for field in fields]
    while pending:
        type_ = pending.pop()
        pending += get_args(type_)
        if (kind := kind_of(type_)) is not None:
            types |= {registry.lookup(kind, name) for name in registry.names(kind)}
        elif isinstance(type_, type) and attrs.has(type_):
            types.add(type_)
    return path[1] == "type" or exists(path[1:], types)


def test_every_key_that_the_tables_name_exists():
    trainers = {registry.lookup("trainer", name) for name in registry.names("trainer")}
    inner = {Source, LoRA}
    words = {"train", "training", "weight", "train_detail", "linear", "constant", "wsd", "dpo", "reward", "causal", "resume",
             "huggingface", "ddp", "fsdp", "auto", "checkpoint.save", "optimizer.build", "batch.weight"}  # fmt: skip
    for library, rows in ELSEWHERE.items():
        for theirs, ours in rows.items():
            for path in paths(ours):
                assert ".".join(path) in words or exists(path, trainers) or exists(path, inner), (library, theirs, path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: 1e-5", "SFTTrainer has no such key; `learning_rate` of TRL is here: `optimizer.lr`"),
        ("warmup_ratio: 0.1", "here: `scheduler.warmup`, below 1"),
        ("report_to: wandb", "`report_to` of TRL is here: `logger`, a list such as"),
        ("sample_packing: true", "`sample_packing` of Axolotl is here: `data.packing`"),
        ("bf16: true", "`bf16` of TRL is here: `precision: bf16-mixed`"),
        ("load_in_4bit: true", "`load_in_4bit` of TRL is here: `model.quantize: nf4`"),
        ("cutoff_len: 10", "`cutoff_len` of LLaMA-Factory is here: `data.max_length`"),
        ("overflow: drop", "SFTTrainer has no such key; it belongs to 'data': write `data.overflow`"),
        ("logger: [all]", "what others call 'all' is here: a list, such as"),
        ("optimizer: adamw_torch", "what others call 'adamw_torch' is here: `adamw`"),
        ("optimizer: {warmup_steps: 5}", "AdamW has no such key; `warmup_steps` of TRL is here: `scheduler.warmup`"),
    ],
)  # fmt: skip
def test_a_key_of_another_library_is_answered_with_ours(tmp_path, line, message):
    (found,) = errors(tmp_path, GOOD + line + "\n")
    assert message in found


def test_what_users_of_other_libraries_write_is_understood(tmp_path):
    made = load(
        recipe(tmp_path, GOOD + "num_train_epochs: 0.5\nprecision: bf16\nscheduler: {warmup_steps: 100}\n"),
        ["data.chat_template_kwargs={enable_thinking: false}"],
    )
    data = as_data(made)
    assert (made.epochs, data["precision"], data["scheduler"]["warmup"]) == (0.5, "bf16-mixed", 100.0)
    assert data["data"]["template_args"] == {"enable_thinking": False}
    (found,) = errors(tmp_path, GOOD + "scheduler: {warmup: 1.5}\n")
    assert "scheduler.warmup: must be a share below 1, or a whole number of steps, got 1.5" in found
    assert as_data(posttrain.SFTTrainer(model=made.model, data=made.data, precision="fp16"))["precision"] == "16-mixed"


# -- the environment ------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["token: hunter2", "token: [hunter2]", "tokn: hunter2", "token: ${hunter2", "token: {a: hunter2}"]
)
def test_a_secret_is_never_repeated(tmp_path, line):
    assert "hunter2" not in field_error(tmp_path, f"{line}\n")
    file = recipe(tmp_path, GOOD.replace("sft", "test-fields"))
    for override in (line.replace(": ", "="), "token=[hunter2", "token=!!int hunter2"):
        with pytest.raises(RecipeError) as caught:
            load(file, [override])
        assert "hunter2" not in str(caught.value) or "!!int" in override


def test_the_value_of_a_secret_is_not_in_the_resolved_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", "hunter2")
    made = fields(tmp_path, "token: ${CANARY}\n")
    assert made.token.reveal() == "hunter2"
    assert "hunter2" not in dump(made) + repr(made.token) + str(as_data(made))
    assert "${CANARY}" in dump(made)


# -- overrides ------------------------------------------------------------------------


def test_overrides_reach_into_lists_texts_and_keys_with_other_names(tmp_path):
    text = "optimizer: {learning_rate: 1}\nscheduler: cosine\ncheckpoint: [{type: resume}]\ndeepspeed: {a: 1}\n"
    overrides = [
        "model={name_or_path: other, dtype: bfloat16}", "optimizer.lr=1e-4", "data.sources.0.split=test", "max_steps=10k",
        "scheduler.warmup=5%", "checkpoint.0.every=5", "strategy=ddp", "tokenizer.name_or_path=tok",
    ]  # fmt: skip
    trainer = load(recipe(tmp_path, GOOD + text), overrides)
    data = as_data(trainer)
    assert data["optimizer"]["lr"] == 1e-4
    assert data["data"]["sources"][0]["name_or_path"] == "org/dataset" and data["data"]["sources"][0]["split"] == "test"
    assert (data["scheduler"]["type"], data["scheduler"]["warmup"]) == ("cosine", 0.05)
    assert (data["checkpoint"][0]["every"], data["max_steps"]) == (5, 10_000)
    assert (data["model"]["name_or_path"], data["model"]["dtype"]) == ("other", "bfloat16")
    assert data["strategy"]["type"] == "ddp"
    assert data["tokenizer"]["name_or_path"] == "tok"


def test_overrides_reach_into_lists_that_the_recipe_does_not_name(tmp_path):
    file = recipe(tmp_path, GOOD)
    usual = as_data(load(file))
    data = as_data(load(file, ["checkpoint.0.every=2", "checkpoint.1.at_end=false", "optimizer.betas.1=0.95"]))
    assert data["checkpoint"] == [
        {**usual["checkpoint"][0], "every": 2}, {**usual["checkpoint"][1], "at_end": False},
    ]  # fmt: skip
    assert data["optimizer"] == {**usual["optimizer"], "betas": [0.9, 0.95]}
    (found,) = errors(tmp_path, GOOD + "sed: 1\n", "checkpoint.0.every=2")  # the rest must be right first
    assert "sed" in found


def test_an_evaluation_needs_data(tmp_path):
    nothing = "there is nothing to evaluate on; give data.eval_split or data.eval_sources"
    text = GOOD + "eval_every: 5\ncallbacks: [early-stop]\n"
    assert errors(tmp_path, text) == [
        f"r.yaml:6: eval_every: {nothing}", f"r.yaml:7: callbacks: early-stop compares evaluations, and {nothing}",
    ]  # fmt: skip
    (found,) = errors(tmp_path, text, "data.eval_split=5%", "eval_every=null")
    assert "early-stop compares evaluations: say with eval_every how often there is one" in found
    assert load(recipe(tmp_path, text), ["data.eval_split=5%"]).eval_every == 5


def test_a_path_of_a_model_that_leads_nowhere_is_noticed_without_a_network(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, hint in (("./models/tinny", "; did you mean 'tiny'?"), ("/no/such/model", ""), ("~/no-such-model", "")):
        text = GOOD.replace("org/model", name) + f"tokenizer: {{name_or_path: {name}}}\n"
        found = errors(tmp_path, text)
        assert found == [
            f"r.yaml:2: model.name_or_path: there is no folder {name}{hint}",
            f"r.yaml:6: tokenizer.name_or_path: there is no folder {name}{hint}",
        ]
    assert load(recipe(tmp_path, GOOD.replace("org/model", "./models/tiny"))).model.name_or_path == "./models/tiny"


def test_an_override_replaces_a_wrong_value_and_its_place(tmp_path):
    assert load(recipe(tmp_path, GOOD + "seed: wrong\n"), ["seed=7"]).seed == 7
    assert errors(tmp_path, GOOD + "seed: 1\n", "seed=[1", "a=1", "model=5")[0].startswith(
        "override seed: not valid YAML"
    )
    assert errors(tmp_path, GOOD, "optimizer={lr: x}") == [
        "override optimizer: optimizer.lr: expected a number, got 'x'"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.7.split=x", "data.sources has 1 value, counted from 0: there is no 7"),
        ("data.sources.split=x", "data.sources is a list: say which entry, such as data.sources.0.split"),
        ("type.x.y=1", "type: expected the name of a trainer, got a mapping"),
        ("seed.x=1", "seed is 1, which has no keys"),
        ("checkpoint.0.every=5", "checkpoint is not a list here"),
        ("logger.7.type=jsonl", "logger has 3 values, counted from 0: there is no 7"),
        ("optimizer.betas.0=x", "optimizer.betas.0: expected a number, got 'x'"),
        ("nonsense.0.x=1", "nonsense is not a list here"),
        ("=1", "has the form"),
        (".=1", "has the form"),
        ("a..b=1", "has the form"),
        ("", "has the form"),
        ("seed", "has the form"),
        ("data.sources.99999999999999=1", "say which entry"),
        ("data.sources.²=1", "say which entry"),
        ("seed=\0", "override seed: holds the character"),
        ("seed=!!python/name:os.system", "override seed: "),
        ("seed=&a [*a]", "an alias that refers to what it is a part of"),
    ],
)
def test_a_bad_override_is_a_message(tmp_path, override, message):
    found = errors(tmp_path, GOOD + "seed: 1\ncheckpoint: {type: resume}\n", override)
    assert message in "\n".join(found)


# -- YAML -----------------------------------------------------------------------------


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


# -- the resolved recipe --------------------------------------------------------------


def test_the_resolved_recipe_loads_to_the_same_trainer(tmp_path):
    first = fields(
        tmp_path,
        """\
        text: "1e-5"
        free: {a: "10k", b: "on", c: "null", d: ["1", "2024-01-01"], e: {f: "two\\nlines\\n", g: "=", h: "<<", i: ""}}
        anything: "true"
        either: ["5", "a: b", "#", "[", "é", "\\u0085", " x "]
        token: ${TOKEN}
        parts: [a, {name: b, share: 1}]
        optimizer: {lr: 1e-7, betas: [90%, .999]}
        deepspeed: {zero_optimization: {stage: 3}}
        """,
    )
    again = load(recipe(tmp_path, dump(first), "again.yaml"))
    assert as_data(again) == as_data(first)
    assert dump(again) == dump(first)
    assert dump(first).startswith("type: test-fields\nmodel:\n")


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


# -- fuzzing --------------------------------------------------------------------------

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


# -- user code ------------------------------------------------------------------------


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


def test_numbers_are_exact():
    assert [number(t) for t in ("0.1k", "1.1M", "7%", "-2k", "1e2k", "x", "1e400", "1e-400")] == [
        100, 1_100_000, 0.07, -2000, 100_000, None, None, 0,
    ]  # fmt: skip
    assert re.fullmatch(r"\d+", str(number("1e300")))


def test_the_home_of_nobody_is_said(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("type: sft\nmodel: {name_or_path: m}\ndata: {sources: ['~nobody-is-called-so/x.jsonl']}\n")
    with pytest.raises(RecipeError, match="there is no such user"):
        load(file)
    file.write_text("type: sft\nmodel: {name_or_path: ~nobody-is-called-so/m}\ndata: {sources: [x/y]}\n")
    with pytest.raises(RecipeError, match=r"model: .*there is no such user as 'nobody-is-called-so'"):
        load(file)
