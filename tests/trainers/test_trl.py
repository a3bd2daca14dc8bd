"""On the same rollouts, loss and gradient are those of TRL's GRPOTrainer, where both define them alike."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import vision
from policies import digest, grpo

from posttrain import AdamW, GRPOTrainer, HFModel, PromptData
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


def theirs(model: Any, folder: Path, config: dict[str, Any], **more: Any) -> Any:
    """Their trainer."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    said: dict[str, Any] = {
        "output_dir": str(folder), "report_to": "none", "max_completion_length": 8, "bf16": False, "use_cpu": True,
        **config,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = trl.GRPOTrainer(
            model=model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=trl.GRPOConfig(**said), train_dataset=Dataset.from_list([{"prompt": "x"}]), **more,
        )  # fmt: skip
    other.current_gradient_accumulation_steps = 1
    return other


def compared(other: Any, trainer: GRPOTrainer, batch: Batch, folder: Path, **more: Any) -> None:
    """Loss and gradient of a batch are those of their trainer on the same rollouts."""
    loss, gradient = ours(trainer, batch)
    run = trainer.run
    other.model.float().load_state_dict(run.model.module.base.state_dict())  # type: ignore[union-attr]
    groups = sorted(read(folder), key=lambda line: line["prompt"])
    prompts = [ids for _, ids, _ in Batch.documents(batch)]
    said = [one["ids"] for line in groups for one in line["replies"]]
    begins = [ids[: len(ids) - len(reply)] for ids, reply in zip(prompts, said, strict=True)]
    inputs = {
        "prompt_ids": padded(begins, True), "prompt_mask": padded([[1] * len(x) for x in begins], True),
        "completion_ids": padded(said, False), "completion_mask": padded([[1] * len(x) for x in said], False),
        "advantages": torch.tensor([one["advantage"] for line in groups for one in line["replies"]]),
        "old_per_token_logps": padded(by_reply(batch, batch["old"]), False),
        "num_items_in_batch": torch.tensor(sum(map(len, said))), **more,
    }  # fmt: skip
    if trainer.beta:
        inputs["ref_per_token_logps"] = padded(by_reply(batch, batch["reference"]), False)
    other.model.train()
    found = other._compute_loss(other.model, inputs)
    found.backward()
    theirs = dict(other.model.named_parameters())
    names = [name.removeprefix("hf.") for name, _ in run.model.module.named_parameters()]  # type: ignore[union-attr]
    slopes = (theirs[name].grad if theirs[name].grad is not None else 0 * theirs[name].detach() for name in names)
    wanted = torch.cat([slope.flatten() for slope in slopes])  # the head of Gemma's tower has no use
    assert loss == pytest.approx(float(found), rel=1e-5, abs=1e-7)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5
    assert json.dumps(digest("", "x", {}))  # the rewards differ, else nothing was compared
    assert float(wanted.norm()) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_are_those_of_trl(name: str, tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("trl")
    keys = OURS.get(name, {"loss_type": name})
    trainer = grpo(tmp_path / "run", tiny_model, **keys, max_steps=1, optimizer=AdamW(lr=1e-12))
    batch = moved(trainer.train().batches[0], 0, trainer.beta)
    config = {"loss_type": name, "beta": 0.0, "num_generations": 4, "per_device_train_batch_size": 16, **THEIRS[name]}
    compared(theirs(str(tiny_model), tmp_path / "trl", config), trainer, batch, tmp_path / "run")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_with_images_too(family: str, tmp_path: Path) -> None:
    """Of the tower that sees, too."""
    pytest.importorskip("trl")
    folder = vision.make(family, tmp_path / "model")
    trainer = grpo(
        tmp_path / "run", folder, beta=0.04, group_size=3, max_steps=1, optimizer=AdamW(lr=1e-12),
        model=HFModel(name_or_path=str(folder), train=["language", "projector", "tower"]),
        data=PromptData(sources=[vision.prompts(tmp_path / "rows")], cache_dir=tmp_path / "cache"),
    )  # fmt: skip
    run = trainer.train()
    batch = moved(run.batches[0], 0, trainer.beta)
    config = {"loss_type": "dapo", "beta": 0.04, "epsilon_high": 0.28, "num_generations": 3}
    model, images = transformers.AutoModelForImageTextToText.from_pretrained(folder), run.tokenizer.images
    other = theirs(
        model, tmp_path / "trl", config | {"per_device_train_batch_size": 12}, processing_class=images.theirs
    )
    lines = sorted(read(tmp_path / "run"), key=lambda line: line["prompt"])
    shown = [vision.SHOWN[line["row"]["answer"]] for line in lines for _ in line["replies"]]
    tensors = images.process([vision.opened(tmp_path / "rows" / f"{n}.png") for one in shown for n in one])[0]
    said = [reply["ids"] for line in lines for reply in line["replies"]]
    begins = [ids[: -len(reply)] for (_, ids, _), reply in zip(batch.documents(), said, strict=True)]
    kinds = [[int(token == images.token_id) for token in ids] for ids in begins]
    name = "mm_token_type_ids" if "image_grid_thw" in tensors else "token_type_ids"
    tensors[name] = torch.cat([padded(kinds, True), torch.zeros_like(padded(said, False))], 1)
    compared(other, trainer, batch, tmp_path / "run", num_images=[len(one) for one in shown], **tensors)
