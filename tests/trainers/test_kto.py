"""Training from verdicts on single replies."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_two_ranks
from toy import metrics

from posttrain import JSONL, AdamW, Constant, HFModel, KTOTrainer, LoRA, UnpairedData
from posttrain.blocks.losses.unpaired import kto as loss_of
from posttrain.errors import DataError


def rows(count: int) -> list[dict[str, Any]]:
    """Replies in lower case are good ones, those in upper case bad ones."""
    return [
        {"prompt": f"say {n}", "completion": ("abcde" if n % 3 else "VWXYZ") * (1 + n % 2), "label": n % 3 > 0}
        for n in range(count)
    ]


def kto(folder: Path, model: Path, count: int = 12, **keys: Any) -> Any:
    file = folder.parent / f"verdicts-{count}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    defaults: dict[str, Any] = {
        "max_steps": 3, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(), "logger": [JSONL()],
        "checkpoint": [], "log_every": 1, "accelerator": "cpu", "output_dir": folder, "eval_every": 3,
    }  # fmt: skip
    data = UnpairedData(
        sources=[file], eval_sources=[file], cache_dir=folder.parent / "cache", packing=keys.pop("packing", False)
    )
    lora = keys.pop("lora", None)
    return KTOTrainer(model=HFModel(name_or_path=str(model), lora=lora), data=data, **{**defaults, **keys})


def test_the_loss_is_what_the_paper_says() -> None:
    gains, good = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.tensor([True, False, True])
    for z in (0.3, -0.4):  # an estimate below 0 counts as 0
        point = max(z, 0.0)
        by_hand = [
            1.5 * (1 - 1 / (1 + math.exp(-0.2 * (0.5 - point)))),
            0.7 * (1 - 1 / (1 + math.exp(-0.2 * (point + 1.0)))),
            1.5 * (1 - 1 / (1 + math.exp(-0.2 * (2.0 - point)))),
        ]
        estimate = torch.tensor(z, dtype=torch.float64)
        assert loss_of(gains, estimate, good, 0.2, 1.5, 0.7).tolist() == pytest.approx(by_hand)
    estimate.requires_grad_()
    loss_of(gains.requires_grad_(), estimate, good, 0.2).sum().backward()
    assert estimate.grad is None


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_it_begins_in_the_middle(tmp_path: Path, tiny_model: Path, lora: Any) -> None:
    kto(tmp_path / "run", tiny_model, lora=lora).train()
    (first, *_) = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["rewards/good"] == pytest.approx(0.0, abs=1e-5)


def test_a_reply_is_compared_with_that_of_another_row(tmp_path: Path, tiny_model: Path) -> None:
    run = kto(tmp_path / "run", tiny_model, max_steps=1, micro_batch_size=12).train()
    tokenizer, (batch,) = run.tokenizer, run.batches
    own, other = (
        [tokenizer.decode([token for token in ids if token < 256]) for _, ids, _ in found.documents()]
        for found in (batch, batch["others"])
    )
    said = {row["prompt"]: row["completion"] for row in rows(12)}
    after = {f"say {n}": rows(12)[(n + 1) % 12]["completion"] for n in range(12)}
    for texts, wanted in ((own, said), (other, after)):
        assert sorted(texts) == sorted(f"user\n{p}\nassistant\n{reply}\n" for p, reply in wanted.items())
    assert batch["others"]["matched"].all()


def test_the_curve_does_not_depend_on_the_cut_or_on_packing(tmp_path: Path, tiny_model: Path) -> None:
    for name, (micro, parts) in {"whole": (4, 1), "2x2": (2, 2), "1x4": (1, 4)}.items():
        kto(tmp_path / name, tiny_model, micro_batch_size=micro, gradient_accumulation_steps=parts).train()
        for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / name), strict=True):
            assert one == pytest.approx(other, abs=2e-6, rel=2e-5), name
    found = [kto(tmp_path / f"{packing}", tiny_model, micro_batch_size=12, max_steps=2, eval_every=2, packing=packing).train()
             for packing in (False, True)]  # fmt: skip
    assert found[0].last["eval_loss"] == pytest.approx(found[1].last["eval_loss"], abs=1e-3)


def train_on_ranks(folder: Path, model: str) -> None:
    from strategies import STRATEGIES

    for name in ("ddp", "fsdp", "zero-3"):
        if name in STRATEGIES:
            cut = {"micro_batch_size": 2, "devices": 2, "strategy": STRATEGIES[name]}
            kto(folder / name, Path(model), **cut).train()


@pytest.mark.slow
def test_two_ranks_train_like_one_under_every_strategy(tmp_path: Path, tiny_model: Path) -> None:
    kto(tmp_path / "one", tiny_model).train()
    on_two_ranks(tmp_path, "test_kto", f"train_on_ranks(folder, {str(tiny_model)!r})")
    assert (tmp_path / "two" / "fsdp").exists()
    for folder in (tmp_path / "two").glob("*/metrics.jsonl"):
        for one, other in zip(metrics(tmp_path / "one"), metrics(folder.parent), strict=True):
            assert one == pytest.approx(other, abs=2e-6, rel=5e-5), folder


def test_it_learns_what_is_good(tmp_path: Path, tiny_model: Path) -> None:
    run = kto(tmp_path / "run", tiny_model, micro_batch_size=12, max_steps=30, optimizer=AdamW(lr=1e-2)).train()
    assert run.last["rewards/good"] > 0.5 + run.last["rewards/bad"]
    assert run.last["loss"] < 0.35


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"label": None}, "there is no verdict: no column label or kto_tag"),
        ({"label": "maybe"}, "'label' is neither"),
    ],
)
def test_a_row_without_a_verdict_is_refused(tmp_path: Path, tiny_model: Path, row: dict[str, Any], said: str) -> None:
    file = tmp_path / "verdicts-3.jsonl"
    file.write_text("".join(json.dumps(one | (row if n == 1 else {})) + "\n" for n, one in enumerate(rows(3))))
    with pytest.raises(DataError, match=said):
        kto(tmp_path / "run", tiny_model, count=3).train()
