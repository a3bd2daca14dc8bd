"""Training for a quantized model: what is trained is what torchao writes, and what is read again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_two_ranks
from toy import losses, trainer

import posttrain
from posttrain.blocks.models.exports import open_model
from posttrain.blocks.models.model import HFModel, LoRA
from posttrain.blocks.models.quantized.aware import QAT
from posttrain.errors import CheckpointError, RecipeError
from posttrain.tools.afterwards.quantize import quantize

pytest.importorskip("torchao")
WAYS = {"int4": QAT(group_size=16), "int8-int4": QAT(activations="int8", group_size=16)}
ROWS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Runs of a few steps, one of each way."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(6) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, qat in (WAYS | {"plain": None}).items():
        posttrain.SFTTrainer(
            model=HFModel(name_or_path=str(tiny_model), qat=qat), optimizer=posttrain.AdamW(lr=1e-3),
            data=posttrain.SFTData(sources=[str(folder / "sums.jsonl")], cache_dir=folder / "cache"),  # type: ignore[list-item]
            logger=[posttrain.JSONL()], accelerator="cpu", log_every=1, max_steps=4, output_dir=folder / name,
        ).train()  # fmt: skip
    return {name: folder / name for name in (*WAYS, "plain")}


def logits(hf: Any) -> torch.Tensor:
    with torch.no_grad():
        return hf(ROWS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", WAYS)
def test_the_quantized_model_says_what_was_trained(way: str, runs: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained = logits(open_model(str(runs[way]), "cpu").hf)
    made = quantize(str(runs[way]), tmp_path / "small")
    assert (made.trained, made.qat) == (True, WAYS[way])
    assert made.apart.difference < 1e-6
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(read), trained, rtol=0, atol=1e-6)
    whole = logits(AutoModelForCausalLM.from_pretrained(runs[way] / "huggingface").eval())
    assert (whole - trained).abs().max() > 1e-3  # the weights themselves say something else
    kinds = {name: type(p).__name__ for name, p in read.named_parameters()}
    assert {kind for name, kind in kinds.items() if "_proj" in name} == {"IntxUnpackedToInt8Tensor"}
    assert {kind for name, kind in kinds.items() if "_proj" not in name} == {"Parameter"}


def test_training_sees_the_rounding_and_its_gradient_passes_it(runs: dict[str, Path]) -> None:
    assert losses(runs["int4"]) != losses(runs["plain"])
    before: Any = HFModel(name_or_path=str(runs["int4"] / "huggingface"), qat=WAYS["int4"]).build(None)
    before.hf(ROWS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in before.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_a_cut_into_micro_batches_changes_nothing_of_a_step(way: str, tmp_path: Path) -> None:
    """Scales are those of a token and of a group of weights: neither knows of other documents. Later steps are only
    close: a number on the edge between two others may be rounded to either, by the last bit of a sum."""
    keys: dict[str, Any] = {"model": {"qat": WAYS[way]}, "max_steps": 3}
    one, two = (
        trainer(tmp_path / str(size), **keys, micro_batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 1)
    )
    found = [losses(made.train().output_dir) for made in (one, two)]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_it_goes_on_bit_by_bit(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"model": {"qat": WAYS["int8-int4"]}, "max_steps": 4}
    trainer(tmp_path / "cut", **keys, stop_after=2).train()
    trainer(tmp_path / "cut", **keys).train()
    assert losses(tmp_path / "cut") == losses(trainer(tmp_path / "whole", **keys).train().output_dir)


def test_any_model_can_be_quantized_and_is_compared_with_itself(runs: dict[str, Path], tmp_path: Path) -> None:
    coarse, fine = (
        quantize(str(runs["plain"]), tmp_path / numbers, QAT(weights=numbers, group_size=16))
        for numbers in ("int4", "int8")  # type: ignore[attr-defined]
    )
    assert not coarse.trained
    assert 0 < fine.apart.kl < coarse.apart.kl
    assert fine.bytes[1] < fine.bytes[0]


def test_what_says_something_else_is_not_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = runs["int4"] / "huggingface" / "quantization.json"
    said = json.loads(file.read_text())
    monkeypatch.setattr(QAT, "prepare", lambda self, hf: None)  # as if training had rounded nothing
    with pytest.raises(CheckpointError, match=r"differs from what was trained by .* nats"):
        quantize(str(runs["int4"]), tmp_path / "small")
    assert not list(tmp_path.iterdir())
    assert said == {"qat": {"weights": "int4", "activations": None, "group_size": 16}}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"qat": QAT(), "lora": LoRA()}, "trains the weights themselves"),
        ({"qat": QAT(group_size=48)}, "48 does not divide"),
        ({"qat": QAT(group_size=16), "config": {"model_type": "mixtral", "num_local_experts": 4}}, "stacks of experts"),
    ],
)
def test_what_cannot_be_quantized_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        trainer(tmp_path, model=keys).train()


def test_options_that_contradict_the_training_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    quantize(str(runs["int4"]), tmp_path / "small")
    with pytest.raises(RecipeError, match="is quantized already"):
        quantize(str(tmp_path / "small"), tmp_path / "x", QAT())
    with pytest.raises(RecipeError, match="was trained for QAT"):
        quantize(str(runs["int4"]), tmp_path / "x", QAT(weights="int8"))
    with pytest.raises(RecipeError, match=r"was not trained to be quantized .* --weights int4"):
        quantize(str(runs["plain"]), tmp_path / "x")


def test_a_run_whose_data_are_not_here_is_compared_on_drawn_tokens(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = Path(shutil.copytree(runs["int4"], tmp_path / "moved"))
    recipe = moved / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("sums.jsonl", "gone.jsonl"))
    assert quantize(str(moved), tmp_path / "small").apart.difference < 1e-6
    assert "tokens drawn at random" in caplog.text
    assert "gone.jsonl" in caplog.text


@pytest.mark.slow
def test_two_ranks_begin_like_one_under_every_strategy(tmp_path: Path) -> None:
    """The first loss is equal; later ones are as close as numbers that lie on the edge between two others allow."""
    alone = trainer(tmp_path / "alone", model={"qat": WAYS["int8-int4"]}, max_steps=3).train()
    for strategy in ("DDP()", "FSDP()", "DeepSpeed(config={'zero_optimization': {'stage': 3}})"):
        (tmp_path / strategy).mkdir()
        on_two_ranks(
            tmp_path / strategy, "test_qat",
            "made = trainer(folder, model={'qat': WAYS['int8-int4']}, max_steps=3, micro_batch_size=2, devices=2,"
            f" strategy=posttrain.{strategy})",
            "made.train()",
        )  # fmt: skip
        found = losses(tmp_path / strategy / "two")
        assert found[0] == pytest.approx(losses(alone.output_dir)[0], abs=1e-6)
        assert found == pytest.approx(losses(alone.output_dir), abs=1e-3)
