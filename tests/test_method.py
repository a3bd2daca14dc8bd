"""A whole method of somebody's own: what grpo.py does needs no help from the library's inside.

Trainer, data block, sampler and rewards are user code. What it takes (columns of rows, made batches, groups that branch,
terms with counts, several updates, evaluations of its own) is held here by what must be true of the method.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from grpo import GRPOTrainer, Prompts, reward
from toy import metrics

from posttrain import JSONL, AdamW, Constant, HFModel


@reward("vowels")
def vowels(reply: str, row: dict[str, Any]) -> float:
    """The share of one letter, which the row names."""
    if row["letter"] == "!":
        raise ValueError("no such letter")
    return reply.count(row["letter"]) / max(1, len(reply))


def prompts(folder: Path, letters: str = "eeee") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.jsonl"
    rows = [{"text": f"say {letter}: {'so ' * n}", "letter": letter} for n, letter in enumerate(letters)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def grpo(folder: Path, model: Path, letters: str = "eeee", **keys: Any) -> Any:
    source = prompts(folder.parent / f"{folder.name} data", letters)
    defaults: dict[str, Any] = {
        "max_steps": 2, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(), "logger": [JSONL()],
        "checkpoint": [], "log_every": 1, "rewards": {"vowels": 1.0}, "accelerator": "cpu", "output_dir": folder,
    }  # fmt: skip
    data = Prompts(sources=[source], eval_sources=[source], cache_dir=folder.parent / "cache")
    return GRPOTrainer(model=HFModel(name_or_path=str(model)), data=data, **{**defaults, **keys})


@pytest.mark.parametrize("over", ["supervised_tokens", "replies"])
def test_the_curve_does_not_depend_on_the_cut_or_on_branching(tmp_path: Path, tiny_model: Path, over: str) -> None:
    keys: dict[str, Any] = {"over": over, "beta": 0.05, "updates": 2, "eval_every": 1}
    grpo(tmp_path / "whole", tiny_model, **keys).train()
    cuts = {"2x2": (2, 2, True), "1x4": (1, 4, True), "padded": (4, 1, False)}
    for name, (micro, parts, branching) in cuts.items():
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": parts, "branching": branching}
        grpo(tmp_path / name, tiny_model, **keys, **cut).train()
        for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / name), strict=True):
            assert one == pytest.approx(other, abs=2e-5, rel=1e-4), name


def test_at_first_nothing_has_moved(tmp_path: Path, tiny_model: Path) -> None:
    grpo(tmp_path / "run", tiny_model, beta=0.05).train()
    first = metrics(tmp_path / "run")[0]
    assert first["off"] == 0.0
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["gap"] < 1e-5  # what the sampler said of its tokens is what the trainer says


def test_a_reward_that_raises_is_counted_and_teaches_nothing(tmp_path: Path, tiny_model: Path) -> None:
    run = grpo(tmp_path / "run", tiny_model, letters="ee!!", max_steps=1).train()
    assert run.last["failed"] == 0.5
    assert run.last["flat"] >= 0.5
    alone = grpo(tmp_path / "alone", tiny_model, letters="!!!!", max_steps=1, max_grad_norm=1e9).train()
    assert alone.last["grad_norm"] == 0.0


def test_it_learns(tmp_path: Path, tiny_model: Path) -> None:
    run = grpo(
        tmp_path / "run", tiny_model, max_steps=25, optimizer=AdamW(lr=1e-2), group_size=16, eval_every=25
    ).train()
    rewards = [line["reward"] for line in metrics(tmp_path / "run") if "reward" in line]
    assert sum(rewards[-5:]) / 5 > 4 * (sum(rewards[:3]) / 3) + 0.1
    assert run.last["eval_reward"] > 0.2
    assert "eval_loss" not in run.last  # it measures rewards, no loss
