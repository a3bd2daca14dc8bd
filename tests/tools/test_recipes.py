"""Recipes: what they mean, and what is said about wrong ones."""

import re
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
from recipe_texts import GOOD, Part, errors, field_error, fields, recipe

import posttrain
from posttrain import registry
from posttrain.blocks.data.sources import Source
from posttrain.blocks.models.lora import LoRA
from posttrain.errors import RecipeError
from posttrain.recipes.elsewhere import ELSEWHERE
from posttrain.recipes.explain import init_fields
from posttrain.recipes.load import dump, load
from posttrain.recipes.structure import kind_of
from posttrain.values import Secret, as_data

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


def test_the_home_of_nobody_is_said(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("type: sft\nmodel: {name_or_path: m}\ndata: {sources: ['~nobody-is-called-so/x.jsonl']}\n")
    with pytest.raises(RecipeError, match="there is no such user"):
        load(file)
    file.write_text("type: sft\nmodel: {name_or_path: ~nobody-is-called-so/m}\ndata: {sources: [x/y]}\n")
    with pytest.raises(RecipeError, match=r"model: .*there is no such user as 'nobody-is-called-so'"):
        load(file)
