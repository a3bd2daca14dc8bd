"""A LoRA run's export as the start of another run: merged under what comes next, or trained on."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import losses, trainer
from transformers import AutoModelForCausalLM

from posttrain.blocks.models.model import HFModel, LoRA, RewardModel
from posttrain.blocks.optimizer import AdamW
from posttrain.errors import RecipeError
from posttrain.trainers.dpo import DPOTrainer

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
IDS = torch.tensor([[5, 6, 7, 9, 30, 2, 8]])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The export of a run with LoRA."""
    folder = tmp_path_factory.mktemp("first")
    train(folder, tiny_model, lora=LoRA(r=4))
    return folder / "huggingface"


def train(folder: Path, name: Path, method: Any = None, **model: Any) -> Any:
    made = trainer(folder, *([method] if method else []), max_steps=3, rows=60, optimizer=AdamW(lr=1e-2))
    made.model = HFModel(name_or_path=str(name), **model)
    return made.train()


def logits(hf: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = hf.eval()(IDS).logits
    return found


def with_peft(folder: Path, base: Any) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base, str(folder)))


def test_an_exported_adapter_is_a_model_to_begin_from(tmp_path: Path, first: Path, tiny_model: Path) -> None:
    """All weights are trained then, the export is a whole model, and the tokenizer is found too."""
    begun = HFModel(name_or_path=str(first)).load()
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = with_peft(first, plain)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(tiny_model)), atol=1e-2)
    torch.testing.assert_close(logits(begun), expected, rtol=1e-5, atol=1e-5)
    run = train(tmp_path, first)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface")
    torch.testing.assert_close(logits(exported), logits(run.model.module.hf))


def test_a_new_adapter_on_a_merged_one_names_it_as_its_base(tmp_path: Path, first: Path, tiny_model: Path) -> None:
    """SFT with LoRA, then DPO with LoRA: the reference is the model after SFT, and the chain of adapters is a model."""
    run = train(tmp_path, first, DPOTrainer, lora=LoRA(r=2))
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    second = tmp_path / "huggingface"
    said = json.loads((second / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["r"]) == (str(first), 2)
    block = HFModel(name_or_path=str(second))
    assert block.base == str(tiny_model)
    torch.testing.assert_close(logits(block.load()), logits(run.model.module.hf), rtol=1e-5, atol=1e-5)
    assert block.content() != HFModel(name_or_path=str(first)).content() != HFModel(name_or_path=block.base).content()


def test_an_adapter_is_trained_on(tmp_path: Path, first: Path, tiny_model: Path) -> None:
    run = train(tmp_path, tiny_model, lora=LoRA(start_from=str(first)))
    trained = {name for name, parameter in run.model.module.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    said = json.loads((tmp_path / "huggingface" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["r"]) == (str(tiny_model), 4)
    before = LoRA(start_from=str(first)).apply(AutoModelForCausalLM.from_pretrained(tiny_model), "CAUSAL_LM", [])
    expected = with_peft(first, AutoModelForCausalLM.from_pretrained(tiny_model))
    torch.testing.assert_close(logits(before), expected, rtol=0, atol=0)
    shapes = {"start_from": str(first), "r": 8}
    assert "leave the other keys out" in dict(LoRA(**shapes).check())["start_from"]
    assert "no adapter_config.json" in dict(LoRA(start_from=str(tiny_model)).check())["start_from"]


def test_a_reward_model_begins_from_an_adapter(first: Path) -> None:
    made = RewardModel(name_or_path=str(first)).load()
    merged = HFModel(name_or_path=str(first)).load()
    torch.testing.assert_close(made.model.state_dict(), merged.model.state_dict())


@pytest.mark.parametrize("base", [None, "/nowhere/at/all"])
def test_an_adapter_without_its_base_is_refused(tmp_path: Path, first: Path, base: str | None) -> None:
    folder = shutil.copytree(first, tmp_path / "moved")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": base}))
    with pytest.raises(RecipeError, match="is an adapter, and .*correct base_model_name_or_path in"):
        HFModel(name_or_path=str(folder)).load()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, first: Path) -> None:
    from toy import LLAMA

    other = HFModel(name_or_path="other", random_init=True, config={**LLAMA, "hidden_size": 16}).load()
    other.save_pretrained(tmp_path / "other")
    folder = shutil.copytree(first, tmp_path / "moved")
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**said, "base_model_name_or_path": str(tmp_path / "other")})
    )
    with pytest.raises(RecipeError, match="does not fit"):
        HFModel(name_or_path=str(folder)).load()
