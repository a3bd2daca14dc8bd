# ruff: noqa: F811 - the fixture of another file is named as an argument
"""A sampler one step ahead: replies are of the policy one step before, sampled while the step is learned from."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import grpo, replies
from ranks import on_two_ranks
from test_agents import played
from test_engines import Double, sampler, serve  # noqa: F401 - a fixture
from test_turns import adder, quiz  # noqa: F401 - a tool
from toy import metrics

from posttrain import TransformersSampler, VllmServerSampler, after, before
from posttrain.errors import RecipeError, TrainingError
from posttrain.synth.environments import ToolEnvironment

AHEAD: dict[str, Any] = {"max_staleness": 1, "correction": "token", "group_size": 2, "max_gap": None}


class Weights:
    """Keeps what replies are worth to the weights of each step: log-probabilities of what was said, by step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gaps: list[float] = []

    def callback(self) -> Any:
        @before("trainer.step")
        def kept(trainer: Any, batches: Any) -> None:
            network = trainer.run.model.module
            self.weights.append({name: value.clone() for name, value in network.state_dict().items()})
            total, count = 0.0, 0
            with torch.no_grad():
                for batch in batches:
                    new = trainer.log_probs(trainer.run.model, batch)
                    network.load_state_dict(self.weights[max(0, len(self.weights) - 2)])
                    old = trainer.log_probs(trainer.run.model, batch)
                    network.load_state_dict(self.weights[-1])
                    assert torch.allclose(old, batch["sampled"].to(old), atol=1e-5)
                    total, count = total + float((new - old).abs().sum()), count + len(new)
            self.gaps.append(total / count)

        return kept


@pytest.mark.parametrize("eval_every", [None, 1])
def test_replies_are_said_by_the_policy_one_step_before(
    tmp_path: Path,
    tiny_model: Path,
    serve: Any,
    eval_every: int | None,
) -> None:
    server, kept = serve(), Weights()
    grpo(
        tmp_path / "run", tiny_model, sampler=sampler(server), max_steps=3, eval_every=eval_every, **AHEAD
    ).train([kept.callback()])  # fmt: skip
    lines = [line for line in metrics(tmp_path / "run") if "sampler/gap" in line]
    assert [line["sampler/gap"] for line in lines] == pytest.approx(kept.gaps, rel=1e-3, abs=1e-6)
    assert kept.gaps[0] < 1e-6
    assert min(kept.gaps[1:]) > 1e-4
    assert all("sampler/waited" in line for line in lines[1:])
    assert [step for step, *_ in replies(tmp_path / "run")] == sorted(step for step, *_ in replies(tmp_path / "run"))


def test_the_next_step_is_sampled_before_this_one_has_ended(tmp_path: Path, tiny_model: Path, serve: Any) -> None:
    server: Double = serve()
    answer, learned, met = server.generate, threading.Event(), list[bool]()

    def slow(body: Any) -> Any:
        if server.version.endswith("-1") and len(server.asked) > AT_ONCE:
            met.append(learned.wait(60))  # the updates of the first step do not wait for this
        return answer(body)

    server.generate = slow  # type: ignore[method-assign]

    @after("trainer.step")
    def told(trainer: Any, loss: Any) -> None:
        learned.set()

    grpo(tmp_path / "run", tiny_model, sampler=sampler(server), max_steps=2, **AHEAD).train([told])
    assert met
    assert all(met)


AT_ONCE = 5
"""Requests of the first step: its four prompts and a probe."""


@pytest.mark.parametrize("play", [quiz, played])
def test_conversations_and_second_tries_come_from_a_sampler_ahead_as_well(
    tmp_path: Path, tiny_model: Path, serve: Any, play: Any
) -> None:
    keys: dict[str, Any] = {"sampler": sampler(serve()), "resample": 1, "max_steps": 3}
    last = play(tmp_path / "run", tiny_model, **keys, **AHEAD).train().last
    assert last["policy/moved"] == 0.0
    assert "resampled" in last


def train_ahead(folder: Path, model: str, url: str) -> None:
    block = VllmServerSampler(base_url=url, max_new_tokens=6, tolerance=1e-4)
    grpo(folder / "run", Path(model), sampler=block, micro_batch_size=2, devices=2, max_steps=3, **AHEAD).train()


def test_two_ranks_are_told_the_same_as_one(tmp_path: Path, tiny_model: Path, serve: Any) -> None:
    server = serve()
    grpo(tmp_path / "run", tiny_model, sampler=sampler(serve()), max_steps=3, **AHEAD).train()
    on_two_ranks(tmp_path, "test_ahead", f"train_ahead(folder, {str(tiny_model)!r}, {server.url!r})")
    assert replies(tmp_path / "two" / "run") == replies(tmp_path / "run")


def test_what_a_sampler_ahead_raises_ends_the_run(tmp_path: Path, tiny_model: Path, serve: Any) -> None:
    server: Double = serve()
    answer = server.generate

    def ends(body: Any) -> Any:
        if len(server.asked) > AT_ONCE:
            server.version = "another"
        return answer(body)

    server.generate = ends  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="has sampled with the weights another"):
        grpo(tmp_path / "run", tiny_model, sampler=sampler(server), max_steps=3, **AHEAD).train()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"correction": "none"}, "replies of an earlier policy need a correction"),
        ({"sampler": TransformersSampler()}, "has no use with a sampler on the device of the trainer"),
        ({"max_staleness": 2}, "max_staleness"),
        ({"environment": ToolEnvironment(tools=["adder"])}, "without limit: say environment.seconds: null"),
    ],
)
def test_what_cannot_run_ahead_is_refused(tmp_path: Path, tiny_model: Path, keys: dict[str, Any], said: str) -> None:
    away = VllmServerSampler(base_url="http://127.0.0.1:9")
    with pytest.raises((RecipeError, ValueError), match=said):
        grpo(tmp_path / "run", tiny_model, **{"sampler": away, **AHEAD, **keys}).train()
