"""A base of 4 or 8 bits under adapters: what the bytes stand for, what is trained, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import recipe
from toy import LLAMA, losses, network, trainer

import posttrain
from posttrain.blocks.models.exports import open_model
from posttrain.blocks.models.model import HFModel, LoRA
from posttrain.blocks.models.quantized.layers import Numbers, QuantizedLinear
from posttrain.blocks.models.quantized.quantize import quantize
from posttrain.blocks.models.quantized.sizes import groups
from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.runtime.folder import difference
from posttrain.tools import plan
from posttrain.tools.twin import proofs
from posttrain.tools.twin.twin import Twin
from posttrain.trainers.dpo import DPOTrainer

bnb = pytest.importorskip("bitsandbytes")
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
QLORA: dict[str, Any] = {"lora": LoRA(r=4), "quantize": "nf4"}


def mean_kl(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of one model's distributions from another's, logits of both."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_bytes_are_those_of_bitsandbytes(kind: Any, double: bool) -> None:
    """The same numbers and gradients as its own layer, for a layer whose numbers do not fill the last block."""
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(37, 11), torch.randn(5, 37)
    theirs = bnb.nn.Linear4bit(37, 11, quant_type=kind, compress_statistics=double, compute_dtype=torch.float32)
    theirs.load_state_dict(plain.state_dict())
    theirs.to("cpu")
    wanted, state = bnb.functional.quantize_4bit(plain.weight.data, quant_type=kind, compress_statistics=double)
    wanted = bnb.functional.dequantize_4bit(wanted, state)
    ours = QuantizedLinear(plain, kind, double, None)
    assert torch.equal(ours.dequantized(), wanted)
    x.requires_grad_()
    found = ours(x)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, wanted, plain.bias))
    found.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * found.detach() @ wanted)


def test_eight_bits_are_rows_by_their_largest_number() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(37, 11, bias=False)
    plain.requires_grad_(False).weight[3] = 0.0  # a row that says nothing
    scale = plain.weight.abs().amax(1, keepdim=True) / 127
    wanted = torch.where(scale > 0, (plain.weight / scale).round() * scale, 0.0)
    found = QuantizedLinear(plain, "int8", False, None).dequantized()
    torch.testing.assert_close(found, wanted)
    assert float((found - plain.weight).abs().max()) <= 0.5001 * float(scale.max())


@pytest.mark.parametrize("quantized", ["nf4", "int8"])
def test_layers_are_bytes_and_embeddings_head_and_norms_are_not(quantized: Any) -> None:
    made: Any = network(quantize=quantized, lora=LoRA(r=4)).build(None)
    for layer in made.base.model.layers:
        linear = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        assert sum(isinstance(part, QuantizedLinear) for part in linear) == 7
        assert layer.input_layernorm.weight.dtype == torch.float32
    assert made.base.lm_head.weight.dtype == made.base.get_input_embeddings().weight.dtype == torch.float32
    trained = {name.split(".")[-3] for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_norms_are_precise_and_the_rest_in_the_type_that_was_asked_for() -> None:
    from lightning.fabric import Fabric

    mixed = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    made: Any = network(**QLORA, dtype="bfloat16").build(mixed)
    assert made.base.lm_head.weight.dtype == torch.bfloat16
    assert made.base.model.norm.weight.dtype == torch.float32
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}


def test_a_quantized_model_says_nearly_what_the_whole_one_says(tiny_model: Path) -> None:
    """The loaded weights, not those of a fresh network: int8 is closer than nf4, and nf4 than chance."""
    ids = torch.arange(20)[None]

    def logits(**keys: Any) -> torch.Tensor:
        made: Any = HFModel(name_or_path=str(tiny_model), **keys).build(None)  # type: ignore[arg-type]
        with torch.no_grad():
            return made.base(input_ids=ids).logits  # type: ignore[no-any-return]

    whole = logits()
    found = {kind: mean_kl(whole, logits(quantize=kind)) for kind in ("nf4", "int8")}
    assert found["int8"] < found["nf4"] < 0.05 * math.log(whole.shape[-1])


@pytest.mark.parametrize("way", [{}, {"activation_checkpointing": True}, {"activation_checkpointing": "selective"}])
def test_experts_are_bytes_too(way: dict[str, Any], tmp_path: Path) -> None:
    """Their gradients are those of the same numbers in full, and no pass keeps the numbers for the backward one."""
    made: Any = network(**QLORA, config=MIXTRAL, **way).build(None)
    stacks = [part for part in made.modules() if isinstance(part, Numbers)]
    assert len(stacks) == 4
    left = [name for name, p in made.named_parameters() if p.is_floating_point() and p.ndim == 3]
    assert not left
    run = trainer(tmp_path, model={**QLORA, "config": MIXTRAL, **way}, max_steps=3).train()
    again = trainer(tmp_path / "plain", model={**QLORA, "config": MIXTRAL}, max_steps=3).train()
    assert losses(run.output_dir) == pytest.approx(losses(again.output_dir), rel=1e-6)


def test_what_products_keep_of_experts_is_made_again() -> None:
    """Bytes alive between the passes: those of activations, and none of the experts' numbers."""
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import AutoModelForCausalLM, MixtralConfig

    def kept(**how: Any) -> tuple[int, torch.Tensor]:
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(MixtralConfig(**{**LLAMA, **MIXTRAL}))
        quantize(hf, "nf4", True, **how)
        hf.get_input_embeddings().weight.requires_grad_()
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        held: list[torch.Tensor] = []
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = hf(input_ids=torch.arange(12)[None]).logits.square().sum()
        loss.backward()
        return sum(sizes.values()), hf.get_input_embeddings().weight.grad

    (less, one), (more, two) = kept(remade=True), kept(remade=False)
    torch.testing.assert_close(one, two)
    experts = 4 * 2 * 4 * (2 * 64 * 32 + 32 * 64) // 4
    assert less + experts // 2 < more


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
def test_qlora_goes_on_bit_by_bit_and_exports_what_peft_and_merge_load(
    tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    def made(folder: Path, **keys: Any) -> Any:
        return posttrain.SFTTrainer(
            model=HFModel(name_or_path=str(tiny_model), quantize="nf4", lora=LoRA(r=4, dropout=0.1)),
            data=posttrain.SFTData(sources=[posttrain.Source(name_or_path=str(sums))], max_length=128),
            output_dir=folder, max_steps=6, micro_batch_size=1, accelerator="cpu", optimizer=posttrain.AdamW(lr=1e-2),
            log_every=1, **keys,
        )  # fmt: skip

    whole = made(tmp_path / "whole").train()
    made(tmp_path / "cut", stop_after=3).train()
    cut = made(tmp_path / "cut").train()
    assert cut.first_step == 3
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    for one, two in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(one, two)
    saved = tmp_path / "whole" / "step-00000006"
    assert sum(file.stat().st_size for file in saved.iterdir()) < 100_000  # nothing of the base
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "whole" / "huggingface"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    quantize(base, "nf4", True)
    loaded, ids = PeftModel.from_pretrained(base, folder).eval(), torch.arange(20)[None]
    ours: Any = whole.model.module.eval()
    wanted = ours.base(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
    # Merged, and opened like a model, it is what was trained, and not the adapter on a base that was not there.
    assert main(["merge", str(tmp_path / "whole"), "-o", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    opened = open_model(str(tmp_path / "whole")).hf
    torch.testing.assert_close(opened(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
    on_the_whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder).eval()
    assert float((on_the_whole(input_ids=ids).logits - wanted).abs().max().detach()) > 1e-2
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)


def test_the_reference_of_dpo_is_the_same_bytes_without_adapters(tmp_path: Path) -> None:
    run = trainer(tmp_path, method=DPOTrainer, model=QLORA, max_steps=3).train()
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert type(run.frozen["reference"]).__name__ == "WithoutAdapters"
    own = trainer(
        tmp_path / "own", method=DPOTrainer, model=QLORA, max_steps=3, seed=42, reference=network(quantize="nf4")
    ).train()
    assert not any(p.requires_grad for p in own.frozen["reference"].parameters())
    assert any(isinstance(part, QuantizedLinear) for part in own.frozen["reference"].modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
def test_a_merge_that_loses_the_tuning_of_a_quantized_base_is_refused(
    tiny_model: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So small a change is below what bfloat16 can tell; in float32 it is kept."""
    posttrain.SFTTrainer(
        model=HFModel(name_or_path=str(tiny_model), quantize="nf4", lora=LoRA(r=4)),
        data=posttrain.SFTData(sources=[posttrain.Source(name_or_path=str(sums))], max_length=128),
        output_dir=tmp_path / "weak", max_steps=1, accelerator="cpu", optimizer=posttrain.AdamW(lr=1e-6),
    ).train()  # fmt: skip
    assert main(["merge", str(tmp_path / "weak"), "-o", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 1
    assert "the adapter does is" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert main(["merge", str(tmp_path / "weak"), "-o", str(tmp_path / "merged")]) == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_no_precision_casts_bytes(precision: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path / "a", model=QLORA, precision=precision, max_steps=3).train()
    plain = trainer(tmp_path / "b", model=QLORA, max_steps=3).train()
    assert losses(run.output_dir) == pytest.approx(losses(plain.output_dir), abs=5e-3)
    kinds = {p.dtype for name, p in run.model.named_parameters() if "self_attn" in name and not p.requires_grad}
    assert kinds == {torch.uint8}


def test_bits_and_bytes_are_said_by_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: Any = network(**QLORA).build(None)
    found = {(group.type, group.trained): group for group in groups(made)}
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert found["nf4", False].numbers == linear
    assert found["nf4", False].bytes == linear // 2 + linear // 64 + 14 * 2 * 4  # codes, scales, theirs and an offset
    assert sum(group.bytes for group in found.values()) == sum(p.numel() * p.element_size() for p in made.parameters())
    trainer(tmp_path, model=QLORA, max_steps=1, logger=[posttrain.Console()]).train()
    assert "18.4k frozen in nf4 of 4.17 bits" in capsys.readouterr().out


def test_a_plan_knows_the_bytes(tiny_model: Path, sums: Path) -> None:
    def said(**keys: Any) -> Any:
        made = posttrain.SFTTrainer(
            model=HFModel(name_or_path=str(tiny_model), **keys), accelerator="cpu",
            data=posttrain.SFTData(sources=[posttrain.Source(name_or_path=str(sums))], max_length=64),
        )  # fmt: skip
        return made, plan.estimate(made, world=1)

    made, found = said(**QLORA)
    network: Any = made.model.build(None)
    assert found.device["parameters"] == sum(p.numel() * p.element_size() for p in network.parameters())
    assert found.trained == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert found.frozen == said(lora=LoRA(r=4))[1].frozen
    assert [group.type for group in found.groups] == ["float32", "nf4", "float32"]


REFUSED: list[tuple[list[str], str]] = [
    (["quantize=nf4"], "what is quantized cannot be trained; write lora: {} too"),
    (["double_quantization=true", "lora={}"], "is of a quantized base"),
    (["quantize=int8", "double_quantization=true", "lora={}"], "is of 4-bit numbers"),
    (["quantize=nf4", "lora={kwargs: {use_dora: true}}"], "begin with, or are scaled by, numbers of the base"),
    (["quantize=nf4", "lora={kwargs: {init_lora_weights: pissa}}"], "begin with, or are scaled by"),
    (["quantize=nf4", "lora={kwargs: {target_parameters: [x]}}"], "adapts what is quantized"),
    (["quantize=nf4", "lora={}", "kwargs={quantization_config: {}}"], "is said twice"),
    (["quantize=nf5", "lora={}"], "nf5"),
    (["load_in_4bit=true"], "`model.quantize: nf4`, with `model.lora`"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    keys: list[str], message: str, tiny_model: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, tiny_model, sums)
    assert main(["check", str(file), *(f"model.{key}" for key in keys)]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_which_much_would_stay_is_refused() -> None:
    """GPT-2's layers are of a class of its own, which bitsandbytes would quantize, and we do not."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
    block = HFModel(name_or_path="toy", random_init=True, config=config, **QLORA)
    with pytest.raises(RecipeError, match=r"would stay as they are, such as h\.0\.mlp"):
        block.build(None)  # type: ignore[arg-type]


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(RecipeError, match=r"pip install 'posttrain\[bnb\]'"):
        network(**QLORA).build(None)


def test_a_key_that_has_come_since_and_is_empty_is_no_other_recipe() -> None:
    """Folders of earlier versions know neither `quantize` nor `groups`."""
    old = {"model": {"lora": None}, "optimizer": {"lr": 1.0}}
    new = {"model": {"lora": None, "quantize": None}, "optimizer": {"lr": 1.0, "groups": None, "args": {}}}
    assert difference(old, new) == []
    new["model"]["quantize"] = "nf4"
    assert difference(old, new) == ['model.quantize: null there, "nf4" here']
    assert 'model.quantize: "nf4" there, null here' in difference(new, old)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
def test_a_twin_proves_the_export_of_adapters_on_a_quantized_base(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, tiny_model, sums)
    twin = Twin(file, ["model.quantize=nf4", "model.lora={r: 4}"], tmp_path)
    assert proofs.export(twin).endswith("differ by 0 at most")
