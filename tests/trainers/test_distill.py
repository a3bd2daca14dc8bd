"""Distillation: stored answers train like the teacher itself, and k of the whole vocabulary is the full divergence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_metrics, assert_same_run
from ranks import on_two_ranks
from strategies import distill
from toy import VOCABULARY, losses, metrics, network, trainer

from posttrain.blocks.losses.divergence import divergence
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.optimizer import AdamW
from posttrain.errors import RecipeError
from posttrain.trainers.sft import SFTTrainer

KINDS = ("forward", "reverse", "js")


def by_hand(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    """Of probabilities [n, vocabulary]."""
    if kind == "forward":
        return (p * (p / q).log()).sum(-1)
    if kind == "reverse":
        return (q * (q / p).log()).sum(-1)
    mean = (p + q) / 2
    return ((p * (p / mean).log()).sum(-1) + (q * (q / mean).log()).sum(-1)) / 2


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(5, 30), 2 * torch.randn(5, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_their_definitions(kind: Any, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = (x.log_softmax(-1) for x in logits)
    torch.testing.assert_close(
        divergence(teacher, student, kind, whole=True),
        by_hand(teacher.exp(), student.exp(), kind),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_were_not_kept_count_as_one(kind: Any, logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = (x.log_softmax(-1) for x in logits)
    known = teacher.topk(6, dim=-1).indices
    lumped = []
    for x in (teacher.exp(), student.exp()):
        kept = x.gather(1, known)
        lumped.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1))
    found = divergence(teacher.gather(1, known), student.gather(1, known), kind, whole=False)
    torch.testing.assert_close(found, by_hand(*lumped, kind), rtol=1e-4, atol=1e-5)
    assert (found <= divergence(teacher, student, kind, whole=True) + 1e-6).all()


def test_slopes_are_those_of_the_full_distribution(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = logits[0].log_softmax(-1), logits[1].requires_grad_()
    (ours,) = torch.autograd.grad(divergence(teacher, student.log_softmax(-1), "forward", whole=True).sum(), student)
    torch.testing.assert_close(ours, (student.softmax(-1) - teacher.exp()).detach(), rtol=1e-4, atol=1e-5)


def test_probabilities_of_nothing_and_of_everything_are_finite() -> None:
    teacher = torch.tensor([[0.0, -torch.inf], [-1e-9, -30.0]])
    student = torch.tensor([[-0.1, -5.0], [-1e-9, -30.0]], requires_grad=True)
    for kind in ("forward", "js"):
        for whole in (True, False):
            found = divergence(teacher, student, kind, whole)  # type: ignore[arg-type]
            (slopes,) = torch.autograd.grad(found.sum(), student)
            assert found.isfinite().all()
            assert slopes.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 8, None])
def test_stored_answers_train_like_the_teacher(tmp_path: Path, kind: str, k: int | None) -> None:
    keys = {"divergence": kind, "top_k": k, "temperature": 1.5, "eval_rows": 9, "eval_every": 2}
    stored = distill(tmp_path / "stored", **keys).train()
    online = distill(tmp_path / "online", stored=False, **keys).train()
    assert_same_run(stored, online)
    assert not stored.frozen
    assert metrics(tmp_path / "stored")[1] == pytest.approx(metrics(tmp_path / "online")[1], abs=2e-6, rel=1e-4)
    mass = metrics(tmp_path / "stored")[0]["teacher_mass"]
    assert (mass == pytest.approx(1, abs=1e-5)) == (k is None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_vocabulary_gives_the_divergence_of_full_logits(tmp_path: Path, kind: str) -> None:
    run = distill(tmp_path, top_k=None, divergence=kind, temperature=2.0, max_steps=1, stored=False).train()
    assert run.first_step == 0
    made = distill(tmp_path / "again", top_k=None, divergence=kind, temperature=2.0, max_steps=1, stored=False)
    seen: list[Any] = []
    import posttrain

    @posttrain.before("trainer.loss")
    def keep(trainer: Any, batch: Any) -> None:
        with torch.no_grad():
            ours, theirs = trainer.run.model.module(batch, "logits"), trainer.run.frozen["teacher"](batch, "logits")
        seen.append(4.0 * by_hand((theirs / 2).softmax(-1), (ours / 2).softmax(-1), kind).sum() / batch["weight"])

    made.train(callbacks=[keep])
    assert losses(tmp_path / "again")[0] == pytest.approx(float(seen[0]), abs=1e-5)


def test_cutting_a_step_changes_nothing_and_padded_rows_read_the_same_answers(tmp_path: Path) -> None:
    keys = {"eval_rows": 9, "eval_every": 2}
    whole = distill(tmp_path / "whole", **keys).train()
    cut = distill(tmp_path / "cut", micro_batch_size=1, gradient_accumulation_steps=4, **keys).train()
    assert_same_run(whole, cut)
    recorded = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "recorded").rglob("*")}
    distill(tmp_path / "padded", packing=False, **keys).train()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "recorded").rglob("*")} == recorded


def test_two_ranks_share_the_pass_of_the_teacher_and_train_like_one(tmp_path: Path) -> None:
    train = "distill(folder, eval_rows=9, eval_every=2, devices=2, micro_batch_size=2).train()"
    chunks = "from posttrain.blocks.data import recorded; recorded.CHUNK = 7"
    on_two_ranks(tmp_path, "test_distill", chunks, train, POSTTRAIN_CACHE=str(tmp_path / "other"))
    distill(tmp_path / "one", eval_rows=9, eval_every=2).train()
    assert_same_metrics(tmp_path / "one", tmp_path / "two")


def test_a_teacher_whose_answers_are_stored_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "teacher"
    network(config={"num_hidden_layers": 1}).build(None).save_pretrained(folder)
    teacher = HFModel(name_or_path=str(folder))
    distill(tmp_path / "one", teacher=teacher).train()
    loaded: list[str] = []
    real = HFModel.load
    monkeypatch.setattr(HFModel, "load", lambda self, *a: loaded.append(self.name_or_path) or real(self, *a))
    distill(tmp_path / "two", teacher=teacher).train()
    assert loaded == ["toy"]
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    network(config={"num_hidden_layers": 1, "rms_norm_eps": 0.1}).build(None).save_pretrained(folder)
    distill(tmp_path / "three", teacher=teacher).train()  # the same folder, other content
    assert str(folder) in loaded


def test_a_teacher_with_a_padded_vocabulary_fits(tmp_path: Path) -> None:
    larger = network(config={"num_hidden_layers": 1, "vocab_size": VOCABULARY + 31})
    distill(tmp_path, teacher=larger, top_k=None).train()
    assert metrics(tmp_path)[0]["teacher_mass"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(RecipeError, match="top_k is 97, but the teacher has a vocabulary of 40"):
        distill(tmp_path / "smaller", teacher=network(config={"vocab_size": 40}), top_k=None).train()


def test_the_student_comes_close_to_its_teacher(tmp_path: Path) -> None:
    sft = trainer(tmp_path / "teacher", SFTTrainer, rows=60, max_steps=60, optimizer=AdamW(lr=3e-3))
    sft.train()
    teacher = HFModel(name_or_path=str(tmp_path / "teacher" / "huggingface"))
    distill(tmp_path / "student", teacher=teacher, max_steps=60, optimizer=AdamW(lr=3e-3)).train()
    found = losses(tmp_path / "student")
    assert found[-1] < found[0] / 4
