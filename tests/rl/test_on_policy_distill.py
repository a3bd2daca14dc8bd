"""On-policy distillation: the teacher tells at every token of what the student says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import metrics

from posttrain import (
    JSONL,
    AdamW,
    Constant,
    DistillTrainer,
    HFModel,
    OnPolicyDistillTrainer,
    PromptData,
    SFTData,
    TransformersSampler,
)
from posttrain.blocks.losses.divergence import jensen_shannon, kl
from posttrain.errors import RecipeError

KINDS = ("reverse", "forward", "js", "sampled")


def distill(folder: Path, student: Path, teacher: Path, chats: bool = False, **keys: Any) -> Any:
    file = folder.parent / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(4) for b in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (SFTData if chats else PromptData)(
        sources=[file], eval_sources=[file], cache_dir=folder.parent / "cache", packing=False
    )
    defaults: dict[str, Any] = {
        "max_steps": 2, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(), "logger": [JSONL()],
        "checkpoint": [], "log_every": 1, "accelerator": "cpu", "output_dir": folder,
        "sampler": TransformersSampler(max_new_tokens=8),
    }  # fmt: skip
    models = {name: HFModel(name_or_path=str(path)) for name, path in (("model", student), ("teacher", teacher))}
    return OnPolicyDistillTrainer(data=data, **models, **{**defaults, **keys})


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that says other things."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("teacher")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter) + 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_has_nothing_to_say(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    distill(tmp_path / "run", tiny_model, tiny_model, divergence=kind, max_steps=1).train()
    (first, *_) = metrics(tmp_path / "run")
    assert first["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert first["grad_norm"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_does_not_depend_on_the_cut(tmp_path: Path, tiny_model: Path, other_model: Path, kind: str) -> None:
    for micro, parts in ((4, 1), (2, 2), (1, 4)):
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": parts, "eval_every": 2}
        distill(tmp_path / str(micro), tiny_model, other_model, divergence=kind, **cut).train()
        for one, other in zip(metrics(tmp_path / "4"), metrics(tmp_path / str(micro)), strict=True):
            assert one == pytest.approx(other, abs=2e-6, rel=2e-5), micro


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_student_comes_closer(tmp_path: Path, tiny_model: Path, other_model: Path, kind: str) -> None:
    keys: dict[str, Any] = {"max_steps": 40, "optimizer": AdamW(lr=1e-2), "micro_batch_size": 12, "eval_every": 40}
    run = distill(tmp_path / "run", tiny_model, other_model, divergence=kind, **keys).train()
    lines = [line["divergence"] for line in metrics(tmp_path / "run") if "divergence" in line]
    assert sum(lines[-3:]) < 0.7 * sum(lines[:3])
    assert run.last["eval_divergence"] < 0.7 * lines[0]


def test_replies_of_the_data_can_be_mixed_in(tmp_path: Path, tiny_model: Path, other_model: Path) -> None:
    """With these alone it is plain distillation."""
    keys: dict[str, Any] = {"chats": True, "on_policy": 0.0, "eval_every": 2}
    ours = distill(tmp_path / "none", tiny_model, other_model, **keys)
    ours.train()
    plain = DistillTrainer(
        model=ours.model, teacher=ours.teacher, data=ours.data, stored=False, top_k=None, divergence="reverse",
        **{name: getattr(ours, name) for name in ("max_steps", "micro_batch_size", "optimizer", "scheduler", "logger",
                                                  "checkpoint", "log_every", "accelerator", "eval_every")},
        output_dir=tmp_path / "plain",
    )  # fmt: skip
    plain.train()
    for one, other in zip(metrics(tmp_path / "none"), metrics(tmp_path / "plain"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert metrics(tmp_path / "none")[-1]["eval_loss"] == pytest.approx(metrics(tmp_path / "plain")[-1]["eval_loss"])
    tokens = {}
    for share in (0.0, 0.5, 1.0):
        run = distill(
            tmp_path / str(share),
            tiny_model,
            other_model,
            chats=True,
            on_policy=share,
            micro_batch_size=12,
            max_steps=1,
        ).train()
        tokens[share] = run.last["supervised_tokens"]
    assert tokens[0.0] < tokens[0.5] < tokens[1.0]  # random weights rarely end what they say


def test_the_generalized_divergence_is_what_the_paper_says() -> None:
    p, q = torch.randn(2, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for beta in (0.1, 0.5, 0.9):
        mix = [beta * math.exp(a) + (1 - beta) * math.exp(b) for a, b in zip(p[0].tolist(), q[0].tolist(), strict=True)]
        sides = [
            sum(math.exp(x) * (x - math.log(m)) for x, m in zip(side[0].tolist(), mix, strict=True)) for side in (p, q)
        ]
        wanted = beta * sides[0] + (1 - beta) * sides[1]
        assert jensen_shannon(p, q, beta).item() == pytest.approx(wanted, rel=1e-10)
    assert (jensen_shannon(p, q, 1e-7) / 1e-7).item() == pytest.approx(kl(p, q).item(), rel=1e-4)
    assert (jensen_shannon(p, q, 1 - 1e-7) / 1e-7).item() == pytest.approx(kl(q, p).item(), rel=1e-4)


def test_the_sampled_divergence_has_the_gradient_of_the_reverse_one() -> None:
    """On average over what the student says: over all tokens of a vocabulary, weighed by their probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    student, teacher = logits.log_softmax(-1), torch.randn(6, dtype=torch.float64, generator=generator).log_softmax(-1)
    (wanted,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)

    class Asked:
        frozen = {"teacher": lambda batch, output, temperature: teacher}
        model = staticmethod(lambda batch, output, temperature: student)

    trainer: Any = OnPolicyDistillTrainer(
        model=HFModel(name_or_path="x"), teacher=HFModel(name_or_path="x"), data=PromptData(sources=["x"]),
        divergence="sampled",
    )  # fmt: skip
    trainer.run = Asked
    found = trainer.distances(None)
    assert found.tolist() == pytest.approx((student - teacher).tolist())
    (slope,) = torch.autograd.grad((student.detach().exp() * found).sum(), logits)
    assert torch.allclose(slope, wanted)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"on_policy": 0.5}, "on_policy: below 1 needs data with replies of its own"),
        ({"divergence": "sampled", "top_k": 3}, "top_k: has no use with `divergence: sampled`"),
    ],
)
def test_what_contradicts_itself_is_said(tmp_path: Path, tiny_model: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        distill(tmp_path / "run", tiny_model, tiny_model, **keys).train()
