"""Overrides on the command line: what they reach, and what is said about wrong ones."""

import pytest
from recipe_texts import GOOD, errors, recipe

from posttrain.recipes.load import load
from posttrain.values import as_data


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
