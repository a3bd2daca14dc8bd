"""Environments of the real package verifiers, of both kinds (`make test-verifiers`)."""

import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from policies import digest, grpo, replies
from toy import metrics

from posttrain import PromptData, TransformersSampler
from posttrain.blocks.data import verifiers
from posttrain.blocks.data.sources import Source
from posttrain.blocks.rollouts.agents.verifiers import VerifiersEnvironment
from posttrain.blocks.rollouts.ledger import read
from posttrain.errors import DataError, TrainingError

STOP = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,")
LOCAL = {"agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}}
"""The agent that only talks, in a process of this machine."""
classic = pytest.mark.skipif(version("verifiers") >= "0.4", reason="verifiers 0.4 has no classic environments")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(Path(__file__).parent)
    yield
    verifiers._loaded.cache_clear()
    for name in ("adds_v1", "adds_classic"):
        sys.modules.pop(name, None)


def played(folder: Path, model: Path, environment: Any, source: str, **keys: Any) -> Any:
    made = grpo(
        folder, model, environment=environment, sampler=TransformersSampler(max_new_tokens=6, stop=STOP), group_size=2,
        max_steps=1, **keys,
    )  # fmt: skip
    made.data = PromptData(sources=[source])
    return made


def test_a_taskset_of_v1_is_played_and_its_failures_are_counted(tmp_path: Path, tiny_model: Path) -> None:
    environment = VerifiersEnvironment(id="adds_v1", args=LOCAL)
    try:
        played(tmp_path / "run", tiny_model, environment, "verifiers:adds_v1").train()
    except TrainingError as error:
        if "failed to prepare uv script" in str(error):
            pytest.skip("uv cannot fetch here what the agent of verifiers needs")
        raise
    (last,) = metrics(tmp_path / "run")
    assert last["policy/moved"] == 0.0
    assert last["sampler/gap"] < 1e-5
    for line in read(tmp_path / "run"):
        for one in line["replies"]:
            if line["row"]["task"]["a"] == 2:
                assert "no such sum" in one["failed"]["environment"]
            else:
                assert one["rewards"]["environment"] == pytest.approx(2 * len(one["text"].strip()) / 10, abs=0.21)
    assert last["failed/environment"] == 0.25


@classic
def test_a_classic_environment_is_played_and_what_its_rubric_hides_is_counted(tmp_path: Path, tiny_model: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    environment = VerifiersEnvironment(id="adds_classic", args={"count": 4})
    for name in ("run", "again"):
        played(tmp_path / name, tiny_model, environment, "verifiers:adds_classic?count=4", rewards=[digest]).train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    (last,) = metrics(tmp_path / "run")
    assert last["policy/moved"] == 0.0
    assert 1 < last["turns"] <= 2
    assert last["turns/anew"] == 0.0
    for line in read(tmp_path / "run"):
        assert [m["role"] for m in line["row"]["prompt"]] == ["system", "user"]
        for one in line["replies"]:
            said = [m["content"] for m in one["messages"] if m["role"] == "assistant"]
            assert one["prompt"] is None  # what the agent asks first is the prompt of the row
            if line["row"]["answer"] == "2":
                assert "no such answer" in one["failed"]["environment"]
            else:
                assert one["rewards"]["environment"] == pytest.approx(sum(map(len, said)) / 10 + 0.5 * len(said))
    assert replies(tmp_path / "again") == replies(tmp_path / "run")


@classic
def test_the_splits_of_a_classic_environment_are_sources(tmp_path: Path) -> None:
    counts = {
        split: len(list(source.open().rows(None)))
        for split, source in {
            "train": Source(name_or_path="verifiers:adds_classic?count=6"),
            "eval": Source(name_or_path="verifiers:adds_classic?count=6", split="eval"),
        }.items()
    }
    assert counts == {"train": 6, "eval": 2}


def test_what_is_wrong_with_an_environment_is_said_in_words(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(DataError, match="there is no environment 'nobody' of verifiers here"):
        Source(name_or_path="verifiers:nobody").open()
    with pytest.raises(DataError, match="the environment 'adds_v1' has no split 'eval'"):
        Source(name_or_path="verifiers:adds_v1", split="eval").open()
    with pytest.raises(DataError, match="the environment 'adds_v1' cannot be loaded: ValidationError: "):
        verifiers.loaded("adds_v1", {"nothing": 1})
    with pytest.raises(TrainingError, match="no reply has a reward.*not authenticated with prime"):
        environment = VerifiersEnvironment(id="adds_v1")  # which wants a machine of its maker
        played(tmp_path / "run", tiny_model, environment, "verifiers:adds_v1").train()
