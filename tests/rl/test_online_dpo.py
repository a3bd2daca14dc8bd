"""Online preference training: pairs of what the model says, told apart by rewards."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import near
from policies import digest, prompts, share
from toy import metrics

from posttrain import JSONL, AdamW, Constant, HFModel, LoRA, OnlineDPOTrainer, PromptData, TransformersSampler, reward
from posttrain.blocks.rollouts.ledger import read
from posttrain.errors import RecipeError


@reward("test-nothing")
def nothing(prompt: str, reply: str, row: dict[str, Any]) -> float:
    return 0.0


def online(folder: Path, model: Path, letters: str = "eeee", **keys: Any) -> Any:
    source = prompts(folder.parent / f"{folder.name} data", letters)
    defaults: dict[str, Any] = {
        "max_steps": 2, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(), "logger": [JSONL()],
        "checkpoint": [], "log_every": 1, "rewards": [digest], "accelerator": "cpu", "output_dir": folder,
        "sampler": TransformersSampler(max_new_tokens=8), "group_size": 4, "eval_every": 2,
    }  # fmt: skip
    data = PromptData(sources=[source], eval_sources=[source], cache_dir=folder.parent / "cache")
    network = HFModel(name_or_path=str(model), lora=keys.pop("lora", None))
    return OnlineDPOTrainer(model=network, data=data, **{**defaults, **keys})


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_it_begins_at_ln_2_with_the_best_and_the_worst_of_each_group(
    tmp_path: Path, tiny_model: Path, lora: Any
) -> None:
    run = online(tmp_path / "run", tiny_model, lora=lora, max_steps=1).train()
    assert metrics(tmp_path / "run")[0]["preference"] == pytest.approx(math.log(2), abs=1e-6)
    said = [ids for _, ids, _ in run.batches[0].documents()]
    for n, line in enumerate(read(tmp_path / "run")):
        ranked = sorted(line["replies"], key=lambda one: one["reward"])
        assert [one["ids"] for one in (ranked[-1], ranked[0])] == [ids[-8:] for ids in said[2 * n : 2 * n + 2]]


def test_the_curve_does_not_depend_on_the_cut(tmp_path: Path, tiny_model: Path) -> None:
    for micro, parts in ((4, 1), (2, 2), (1, 4)):
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": parts}
        online(tmp_path / str(micro), tiny_model, loss_type="ipo", **cut).train()
        near(metrics(tmp_path / str(micro)), metrics(tmp_path / "4"), str(micro))


def test_equal_replies_are_no_pair(tmp_path: Path, tiny_model: Path) -> None:
    run = online(tmp_path / "run", tiny_model, rewards=[nothing], max_steps=1, max_grad_norm=1e9).train()
    assert run.last["flat"] == 1.0
    assert run.last["preference"] == run.last["grad_norm"] == 0.0


def test_it_learns(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 40, "optimizer": AdamW(lr=1e-2), "group_size": 16, "rewards": [share]}
    online(tmp_path / "run", tiny_model, eval_every=40, **keys).train()
    rewards = [line["reward"] for line in metrics(tmp_path / "run") if "reward" in line]
    assert sum(rewards[-5:]) / 5 > 4 * (sum(rewards[:3]) / 3) + 0.05


def test_losses_of_other_kinds_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    for loss in ("aot", "orpo"):
        with pytest.raises(RecipeError, match=f"loss_type: {loss} is no loss of single pairs with a reference"):
            online(tmp_path / "run", tiny_model, loss_type=loss).train()
    assert torch.is_grad_enabled()
