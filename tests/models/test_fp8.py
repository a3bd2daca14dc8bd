"""Products in fp8: of weights that stay as they are, emulated where there is no such GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_two_ranks
from safetensors.torch import load_file
from toy import losses, trainer

import posttrain
from posttrain.blocks.models.model import HFModel, LoRA
from posttrain.blocks.models.quantized.aware import QAT
from posttrain.blocks.models.quantized.fp8 import FP8
from posttrain.errors import RecipeError

pytest.importorskip("torchao")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def converted(hf: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, m in hf.named_modules() if type(m).__name__ == "Float8Linear"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of a few steps, plain and with each recipe."""
    folder = tmp_path_factory.mktemp("runs")
    made = {name: {"fp8": FP8(recipe=name, emulate=True)} for name in RECIPES} | {"plain": {}}  # type: ignore[arg-type]
    return {name: trainer(folder / name, model=keys, max_steps=4).train() for name, keys in made.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_layers_multiply_in_fp8_and_the_loss_stays_close(name: str, runs: dict[str, Any]) -> None:
    hf = runs[name].model.module.hf
    assert converted(hf) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not isinstance(hf.lm_head, type(hf.model.layers[0].mlp.up_proj))
    ours, plain = losses(runs[name].output_dir), losses(runs["plain"].output_dir)
    assert ours != plain
    assert ours == pytest.approx(plain, rel=0.01)


def test_the_product_is_that_of_numbers_rounded_by_their_largest(runs: dict[str, Any]) -> None:
    """The reference is written out: 448 is the largest number of e4m3."""
    layer = runs["tensorwise"].model.module.hf.model.layers[0].mlp.up_proj
    x = torch.randn(5, layer.in_features)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scale = 448 / values.abs().max()
        return (values * scale).to(torch.float8_e4m3fn).float() / scale

    with torch.no_grad():
        torch.testing.assert_close(layer(x), rounded(x) @ rounded(layer.weight).T)
        assert (layer(x) - x @ layer.weight.T).abs().max() > 1e-4


def test_scales_of_rows_do_not_know_how_a_step_is_cut(tmp_path: Path) -> None:
    """One of a whole tensor does: the largest number may be of another document."""
    found: dict[str, list[float]] = {}
    for name in ("rowwise", "tensorwise"):
        for size in (4, 1):
            keys: dict[str, Any] = {"micro_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
            fp8 = FP8(recipe=name, emulate=True)  # type: ignore[arg-type]
            run = trainer(tmp_path / f"{name}{size}", model={"fp8": fp8}, **keys).train()
            found.setdefault(name, []).extend(losses(run.output_dir))
    assert found["rowwise"][0] == pytest.approx(found["rowwise"][1], abs=1e-6)
    assert found["tensorwise"][0] != pytest.approx(found["tensorwise"][1], abs=1e-6)


def test_it_goes_on_bit_by_bit_and_exports_plain_weights(tmp_path: Path, runs: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    keys: dict[str, Any] = {"model": {"fp8": FP8(emulate=True)}, "max_steps": 4}
    trainer(tmp_path / "cut", **keys, stop_after=2).train()
    cut = trainer(tmp_path / "cut", **keys).train()
    assert losses(cut.output_dir) == losses(runs["tensorwise"].output_dir)
    folder = cut.output_dir / "huggingface"
    held = cut.model.module.hf.state_dict()
    assert all(torch.equal(held[name], value) for name, value in load_file(folder / "model.safetensors").items())
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert not converted(read)
    assert not hasattr(read.config, "quantization_config")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fp8": True}, r"compute capability 8.9 or more .* this device, cpu, has none.*emulate: true"),
        ({"fp8": FP8(emulate=True), "config": {"model_type": "mixtral", "num_local_experts": 4}}, "stacks of experts"),
        ({"fp8": FP8(emulate=True), "config": {"hidden_size": 40}}, r"model.fp8: .* in none of the 0 linear layers"),
        ({"fp8": True, "lora": LoRA()}, "leave lora, quantize and qat out"),
        ({"fp8": True, "qat": QAT()}, "leave lora, quantize and qat out"),
    ],
)
def test_what_cannot_multiply_in_fp8_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        trainer(tmp_path, model=keys).train()


def test_an_old_gpu_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    device = torch.device("cuda", 0)
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if fits:
            FP8().check_device(device)
        else:
            with pytest.raises(RecipeError, match=r"NVIDIA A100 has compute capability 8\.0"):
                FP8().check_device(device)


def test_a_recipe_says_true_or_how() -> None:
    from posttrain.recipes.structure import converter

    assert converter.structure({"name_or_path": "x/y", "fp8": True}, HFModel).fp8 == FP8()
    assert converter.structure({"name_or_path": "x/y", "fp8": {"recipe": "rowwise"}}, HFModel).fp8 == FP8(
        recipe="rowwise"
    )
    assert converter.structure({"name_or_path": "x/y", "fp8": False}, HFModel).fp8 is False


def test_a_plan_needs_no_gpu_and_counts_the_same_products(tmp_path: Path, tiny_model: Path) -> None:
    from posttrain.tools.plan import estimate

    def planned(fp8: Any) -> Any:
        data = posttrain.SFTData(sources=[posttrain.Source(name_or_path="none")], max_length=64)
        model = HFModel(name_or_path=str(tiny_model), fp8=fp8)
        return estimate(posttrain.SFTTrainer(model=model, data=data, accelerator="cuda", devices=1), 1)

    low, plain = planned(True), planned(False)
    assert low.operations == plain.operations
    assert low.device["optimizer state"] == plain.device["optimizer state"]


@pytest.mark.slow
def test_two_ranks_begin_like_one(tmp_path: Path) -> None:
    """Scales of rows are of a rank's own tokens in the gradient of weights alone."""
    alone = trainer(tmp_path / "alone", model={"fp8": FP8(recipe="rowwise", emulate=True)}, max_steps=3).train()
    for strategy in ("DDP()", "FSDP()", "DeepSpeed(config={'zero_optimization': {'stage': 3}})"):
        (tmp_path / strategy).mkdir()
        on_two_ranks(
            tmp_path / strategy, "test_fp8",
            "made = trainer(folder, model={'fp8': FP8(recipe='rowwise', emulate=True)}, max_steps=3, micro_batch_size=2,"
            f" devices=2, strategy=posttrain.{strategy})",
            "made.train()",
        )  # fmt: skip
        found = losses(tmp_path / strategy / "two")
        assert found[0] == pytest.approx(losses(alone.output_dir)[0], abs=1e-6)
        assert found == pytest.approx(losses(alone.output_dir), rel=0.01)
