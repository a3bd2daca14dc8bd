"""On the same rollouts, loss and gradient are those of TRL's GRPOTrainer, where both define them alike."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policies import digest, grpo

from posttrain import AdamW, GRPOTrainer
from posttrain.batch import Batch, Extra
from posttrain.blocks.rollouts.ledger import read

THEIRS: dict[str, dict[str, Any]] = {
    "grpo": {}, "dr_grpo": {"scale_rewards": "none"}, "bnpo": {}, "dapo": {"epsilon_high": 0.28},
    "cispo": {"epsilon_high": 5.0}, "sapo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "dapo with a reference": {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.04},
    "dapo with k3": {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.04, "use_bias_correction_kl": False},
    "grpo clipped at both sides": {"loss_type": "grpo", "delta": 1.3},
}  # fmt: skip
"""Our loss -> what their configuration says beside its name."""
OURS: dict[str, dict[str, Any]] = {
    "dapo with a reference": {"loss_type": "dapo", "beta": 0.04},
    "dapo with k3": {"loss_type": "dapo", "beta": 0.04, "kl": "k3"},
    "grpo clipped at both sides": {"loss_type": "grpo", "loss_args": {"delta": 1.3}},
}


def moved(batch: Batch, seed: int, beta: float) -> Batch:
    """A batch whose policy and reference are other ones, so that ratios are clipped and the divergence is not 0."""
    random = np.random.default_rng(seed)
    old, reference = (
        batch["sampled"] + torch.tensor(random.normal(0, scale, len(batch.targets)), dtype=torch.float32)
        for scale in (0.3, 0.1)
    )
    return batch.but(old=Extra(old, "target"), **({"reference": Extra(reference, "target")} if beta else {}))


def ours(trainer: GRPOTrainer, batch: Batch) -> tuple[float, torch.Tensor]:
    run = trainer.run
    run.model.zero_grad()
    with run.metrics.counting(batch, trainer.totals([batch])) as counted:
        loss = trainer.weighed(trainer.terms(counted))
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss), torch.cat([p.grad.flatten() for p in run.model.parameters()])  # type: ignore[union-attr]


def padded(rows: list[list[float]], left: bool) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows])


def by_reply(batch: Batch, values: torch.Tensor) -> list[list[float]]:
    return [values[batch["document"] == n].tolist() for n in range(len(batch["lengths"]))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_are_those_of_trl(name: str, tmp_path: Path, tiny_model: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    keys = OURS.get(name, {"loss_type": name})
    trainer = grpo(tmp_path / "run", tiny_model, **keys, max_steps=1, optimizer=AdamW(lr=1e-12))
    run = trainer.train()
    batch = moved(run.batches[0], 0, trainer.beta)
    loss, gradient = ours(trainer, batch)

    config: dict[str, Any] = {
        "output_dir": str(tmp_path / "trl"), "loss_type": name, "beta": 0.0, "num_generations": 4, "report_to": "none",
        "per_device_train_batch_size": 16, "max_completion_length": 8, "bf16": False, "use_cpu": True, **THEIRS[name],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = trl.GRPOTrainer(
            model=str(tiny_model), reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=trl.GRPOConfig(**config), train_dataset=Dataset.from_list([{"prompt": "x"}]),
        )  # fmt: skip
    other.model.float().load_state_dict(run.model.module.base.state_dict())
    other.current_gradient_accumulation_steps = 1
    groups = sorted(read(tmp_path / "run"), key=lambda line: line["prompt"])
    prompts = [ids for _, ids, _ in Batch.documents(batch)]
    said = [one["ids"] for line in groups for one in line["replies"]]
    begins = [ids[: len(ids) - len(reply)] for ids, reply in zip(prompts, said, strict=True)]
    inputs = {
        "prompt_ids": padded(begins, True), "prompt_mask": padded([[1] * len(x) for x in begins], True),
        "completion_ids": padded(said, False), "completion_mask": padded([[1] * len(x) for x in said], False),
        "advantages": torch.tensor([one["advantage"] for line in groups for one in line["replies"]]),
        "old_per_token_logps": padded(by_reply(batch, batch["old"]), False),
        "num_items_in_batch": torch.tensor(sum(map(len, said))),
    }  # fmt: skip
    if trainer.beta:
        inputs["ref_per_token_logps"] = padded(by_reply(batch, batch["reference"]), False)
    other.model.train()
    found = other._compute_loss(other.model, inputs)
    found.backward()
    theirs = dict(other.model.named_parameters())
    names = [name.removeprefix("hf.") for name, _ in run.model.module.named_parameters()]
    wanted = torch.cat([theirs[name].grad.flatten() for name in names])
    assert loss == pytest.approx(float(found), rel=1e-5, abs=1e-7)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5
    assert json.dumps(digest("", "x", {}))  # the rewards differ, else nothing was compared
    assert float(wanted.norm()) > 1e-3
