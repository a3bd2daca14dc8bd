"""What `posttrain plan` says is what a step takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from allocated import training
from ranks import recipe
from transformers import AutoConfig

import posttrain
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.tools import plan, tracing
from posttrain.trainers.sft import SFTTrainer

WAYS: list[dict[str, Any]] = [
    {}, {"activation_checkpointing": True}, {"activation_checkpointing": "selective"},
    {"activation_checkpointing": True, "tiled_mlp": 4},
]  # fmt: skip


def made(model: Path, source: Path, **keys: Any) -> SFTTrainer:
    way = keys.pop("way", {})
    data = posttrain.SFTData(sources=[posttrain.Source(name_or_path=str(source))], max_length=512)
    return SFTTrainer(
        model=posttrain.HFModel(name_or_path=str(model), **way),
        **{"accelerator": "cpu", "micro_batch_size": 2, "data": data, **keys},
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_activations_are_those_of_a_real_step(tiny_model: Path, sums: Path, way: dict[str, Any]) -> None:
    trainer = made(tiny_model, sums, way=way)
    said = plan.estimate(trainer, world=1).device["activations, logits, loss"]
    network = trainer.model.build(None)  # type: ignore[arg-type]
    batch = tracing.fullest(trainer)

    def forget(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(forget)
    with tracing.Alive() as alive:
        (network(batch) / batch["weight"]).backward()
    assert said == pytest.approx(alive.peak, rel=0.02)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_come_as_activations_go(tiny_model: Path, sums: Path, way: dict[str, Any]) -> None:
    """Of a step in one pass; where several are summed, all gradients are there while the next has its activations."""
    trainer = made(tiny_model, sums, way=way, micro_batch_size=1)
    said = plan.estimate(trainer, world=1)
    network = trainer.model.build(None)  # type: ignore[arg-type]
    batch = tracing.fullest(trainer)
    with tracing.Alive() as alive:
        (network(batch) / batch["weight"]).backward()
    assert said.total - said.device["parameters"] - said.device["optimizer state"] == pytest.approx(
        alive.peak, rel=0.02
    )
    summed = plan.estimate(made(tiny_model, sums, way=way, micro_batch_size=1, gradient_accumulation_steps=2), world=1)
    assert summed.total - said.total == -said.device.get("never at the same moment", 0) > 0


def test_parameters_gradients_and_optimizer_state_are_exact(tiny_model: Path, sums: Path) -> None:
    trainer = made(tiny_model, sums)
    network = trainer.model.build(None)  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in network.parameters())
    tensors = len(list(network.parameters()))
    said = plan.estimate(trainer, world=1)
    assert (said.trained, said.frozen) == (count, 0)
    assert said.device["parameters"] == said.device["gradients"] == 4 * count
    assert said.device["optimizer state"] == 8 * count + 4 * tensors  # two moments, and the step of each tensor


def test_strategies_divide_what_they_shard(tiny_model: Path, sums: Path) -> None:
    whole = plan.estimate(made(tiny_model, sums, strategy=posttrain.DDP()), world=4)
    shards = plan.estimate(made(tiny_model, sums, strategy=posttrain.FSDP()), world=4)
    hybrid = plan.estimate(made(tiny_model, sums, strategy=posttrain.FSDP(shard_size=2)), world=4)
    host = plan.estimate(made(tiny_model, sums, strategy=posttrain.FSDP(cpu_offload=True)), world=4)
    for name in ("parameters", "gradients", "optimizer state"):
        assert shards.device[name] == -(-whole.device[name] // 4) == host.host[name]
        assert hybrid.device[name] == -(-whole.device[name] // 2)
        assert name not in host.device
    zero = {stage: posttrain.DeepSpeed(config={"zero_optimization": {"stage": stage}}) for stage in (1, 2, 3)}
    found = {stage: plan.estimate(made(tiny_model, sums, strategy=each), world=4) for stage, each in zero.items()}
    for least, name in ((1, "optimizer state"), (2, "gradients"), (3, "parameters")):
        for stage, said in found.items():
            assert said.device[name] == (-(-whole.device[name] // 4) if stage >= least else whole.device[name])


def test_adapters_and_references_are_counted(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    adapted = plan.estimate(made(tiny_model, sums, way={"lora": posttrain.LoRA(r=2)}), world=1)
    assert 0 < adapted.trained < adapted.frozen
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n')
    trainer = posttrain.DPOTrainer(
        model=posttrain.HFModel(name_or_path=str(tiny_model)), accelerator="cpu",
        data=posttrain.PreferenceData(sources=[posttrain.Source(name_or_path=str(pairs))], max_length=64),
    )  # fmt: skip
    said = plan.estimate(trainer, world=1)
    assert said.device["references and teachers"] == said.device["parameters"]


def test_the_command_says_whether_it_fits_and_what_would_help(
    tmp_path: Path, tiny_model: Path, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, tiny_model, sums, micro_batch_size=8)
    assert main(["plan", str(file)]) == 0
    assert "fits into 80 GiB" in capsys.readouterr().out
    assert main(["plan", str(file), "--world", "2", "--gpu-memory", "0.001"]) == 1
    said = capsys.readouterr().out
    assert "does not fit into 0.001 GiB" in said
    assert "micro_batch_size: 1, gradient_accumulation_steps: 8" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_operations_are_those_of_the_products(tiny_model: Path, sums: Path, kind: str) -> None:
    """Written out: two for each number of a matrix and token, three passes over each product, and attention."""
    experts = {"model_type": kind, "num_local_experts": 8, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    size, wide, layers, heads, vocabulary = 32, 64, 2, 4, 100
    config = {
        "model_type": kind, "hidden_size": size, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary, **experts,
    }  # fmt: skip
    trainer = made(tiny_model, sums, way={"random_init": True, "config": config})
    found = plan.estimate(trainer, world=1)
    tokens = trainer.micro_batch_size * trainer.data.max_length
    assert found.tokens == tokens
    layer = 4 * size * size + 3 * size * wide * (2 if experts else 1) + (8 * size if experts else 0)
    head = (tokens - trainer.micro_batch_size) * size * vocabulary  # the first token of a row is nobody's target
    products = 3 * 2 * (tokens * layers * layer + head)
    attention = layers * tokens * trainer.data.max_length * size * 2 * (1 + 2.5)  # half of the square, forward and back
    assert found.operations == pytest.approx(products + attention, rel=0.01)


def test_a_model_that_looks_at_numbers_has_no_plan_and_says_so(sums: Path, tiny_model: Path) -> None:
    """JetMoE asks how many tokens each of its experts gets."""
    config = tiny(AutoConfig.for_model("jetmoe"), vocabulary=97).to_dict()
    way = {"random_init": True, "config": config}
    with pytest.raises(RecipeError, match=r"depends on what it is given \(aten._local_scalar_dense"):
        plan.estimate(made(tiny_model, sums, way=way), world=1)


LONG = {"vocab_size": 300, "num_hidden_layers": 4, "length": 512, "micro_batch_size": 1}
"""Activations are most of it, what attention gives for each document and for the row among them."""
SHORT = {"vocab_size": 8000, "num_hidden_layers": 6, "length": 48, "way": {"activation_checkpointing": True}}
"""The gradients of the embedding, which is the head, too, and what the optimizer needs for a moment."""
STEPS: dict[str, dict[str, Any]] = {
    "full": LONG,
    "summed": {**LONG, "gradient_accumulation_steps": 2},
    "lora": {**LONG, "way": {"lora": posttrain.LoRA(r=4), "quantize": "nf4"}},
    "recomputed": SHORT,
    "adafactor": {**SHORT, "optimizer": posttrain.Adafactor()},
    "adamw-8bit": {**SHORT, "optimizer": posttrain.AdamW8bit()},
    "bf16": {**SHORT, "precision": "bf16-true", "optimizer": posttrain.AdamWBF16()},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_training_takes_what_was_planned(case: str, tiny_model: Path, tmp_path: Path) -> None:
    """Counted by torch's allocator, on rows that several documents fill."""
    if case in ("lora", "adamw-8bit"):
        pytest.importorskip("bitsandbytes")
    keys = dict(STEPS[case])
    length = keys.pop("length")
    shape = {name: keys.pop(name) for name in ("vocab_size", "num_hidden_layers")}
    config = {"hidden_size": 64, "intermediate_size": 64, "tie_word_embeddings": True, **shape}
    text = tmp_path / "text.jsonl"
    text.write_text(f'{{"text": "{"a" * (length // 4 - 1)}"}}\n' * 20)
    trainer = made(
        tiny_model, text, way={"random_init": True, "config": config, **keys.pop("way", {})}, **keys, max_steps=2,
        data=posttrain.CausalData(sources=[str(text)], max_length=length), output_dir=tmp_path / "run", checkpoint=[],
        logger=[],
    )  # fmt: skip
    assert plan.estimate(trainer, world=1).total == pytest.approx(training(trainer), rel=0.02)


@pytest.mark.gpu
def test_a_gpu_takes_what_was_planned(tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    """A model large enough that the allocator's rounding and the libraries' workspaces are small beside it."""
    config = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}
    way = {"random_init": True, "config": config, "activation_checkpointing": True}
    trainer = made(tiny_model, sums, way=way, accelerator="cuda", max_steps=2, output_dir=tmp_path, checkpoint=[])
    said = plan.estimate(trainer, world=1).total
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert torch.cuda.max_memory_allocated() == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamWBF16", "AdamW8bit", "Adafactor", "Lion", "SGD", "Muon"])
@pytest.mark.parametrize("strategy", [posttrain.DDP(), posttrain.FSDP()])
def test_a_plan_knows_what_each_optimizer_keeps(optimizer: str, strategy: Any, tiny_model: Path, sums: Path) -> None:
    """Also where a strategy casts for products: states are of the parameters as they are kept."""
    if optimizer == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    block = getattr(posttrain, optimizer)()
    trainer = made(tiny_model, sums, optimizer=block, strategy=strategy, precision="bf16-mixed")
    network = trainer.model.build(None)  # type: ignore[arg-type]
    kept, _ = tracing.stepped(block.build(network))
    assert plan.estimate(trainer, world=1).device.get("optimizer state", 0) == kept
