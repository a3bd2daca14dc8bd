"""Model blocks: where weights come from, which of them are trained, and what is exported."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_two_ranks
from safetensors.torch import load_file
from tokens import byte_tokenizer
from toy import LLAMA, losses, trainer
from transformers import AutoModelForCausalLM

from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.model import HFModel, LoRA, RewardModel
from posttrain.blocks.optimizer import AdamW
from posttrain.blocks.scheduler import Constant
from posttrain.blocks.tokenizers.tokenizer import HFTokenizer
from posttrain.errors import RecipeError, TrainingError
from posttrain.runtime.precision import halve
from posttrain.values import Secret


def built(**keys: Any) -> Any:
    return HFModel(**{"name_or_path": "toy", "random_init": True, "config": LLAMA, **keys}).build(None)  # type: ignore[arg-type]


def test_a_saved_model_is_loaded_with_its_weights(tiny_model: Path) -> None:
    ours = HFModel(name_or_path=str(tiny_model)).build(None)  # type: ignore[arg-type]
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.hf.state_dict()[name], value)
    assert ours.hf.config._attn_implementation == "packed"


def test_files_that_lack_weights_are_refused(tiny_model: Path) -> None:
    """transformers would draw them at random, with a report that is easily overlooked."""
    deeper = HFModel(name_or_path=str(tiny_model), config={"num_hidden_layers": 3})
    with pytest.raises(RecipeError, match=r"hold no model.layers.2.\S+, .* and 6 more weights, which would be random"):
        deeper.build(None)  # type: ignore[arg-type]
    RewardModel(name_or_path=str(tiny_model)).build(None)  # type: ignore[arg-type]  # its head is new


def test_random_weights_take_only_the_configuration(tiny_model: Path) -> None:
    made: Any = HFModel(name_or_path=str(tiny_model), random_init=True, config={"num_hidden_layers": 1}).build(None)  # type: ignore[arg-type]
    assert len(made.hf.model.layers) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"freeze": ["*.embeddings.*"]}, r"model.freeze: '\*.embeddings.\*' matches no parameter"),
        ({"freeze": ["*"]}, "leaves nothing to train"),
        ({"attn_implementation": "flash_attention_9"}, "cannot be loaded"),
        ({"config": {**LLAMA, "model_type": "lama"}}, "cannot be loaded"),
        (
            {"kwargs": {"load_in_4bit": True}, "random_init": False, "config": {}},
            "take load_in_4bit: write model.quantize: nf4",
        ),
        ({"kwargs": {"foo": True}, "random_init": False, "config": {}}, "model.kwargs: transformers does not take foo"),
    ],
)
def test_options_that_do_not_fit_are_refused(tiny_model: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        built(**{"name_or_path": str(tiny_model), **keys})


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_type": "default"}),
        ({"rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0, "rope_type": "default"}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0},
        ),
        ({"rope_scaling": None, "rope_theta": 7.0}, {"rope_theta": 7.0, "rope_type": "default"}),
    ],
)
def test_how_positions_are_rotated_can_be_changed(tiny_model: Path, config: Any, found: dict[str, Any]) -> None:
    made: Any = HFModel(name_or_path=str(tiny_model), config=config).build(None)  # type: ignore[arg-type]
    assert made.hf.config.rope_parameters == found
    base = found["rope_theta"] ** -(torch.arange(0, 8, 2) / 8) / found.get("factor", 1)
    torch.testing.assert_close(made.hf.model.rotary_emb.inv_freq, base)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"config": {"hiden_size": 8}}, "LlamaConfig has no key 'hiden_size'.* did you mean 'hidden_size'"),
        ({"config": {"n_embd": 8, "foo": 1}}, "(?s)'n_embd'.*'foo'"),
        ({"config": {**LLAMA, "foo": 1}, "random_init": True}, "LlamaConfig has no key 'foo'"),
        (
            {"config": {"model_type": "gpt2", "rope_theta": 2.0}, "random_init": True, "name_or_path": "toy"},
            "GPT2Config has no key 'rope_theta'",
        ),
        ({"config": {"model_type": "gemma3", "num_hidden_layers": 2}, "random_init": True}, "write text_config: "),
        (
            {"config": {"model_type": "gemma3", "text_config": {"hiden": 1}}, "random_init": True},
            "has no key 'text_config.hiden'",
        ),
    ],
)
def test_changes_that_would_change_nothing_are_refused(tiny_model: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        HFModel(**{"name_or_path": str(tiny_model), **keys}).read_config()


def test_layers_that_rotate_in_their_own_ways_are_changed_by_their_names(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig

    Gemma3TextConfig().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="write rope_parameters: {full_attention: {rope_theta: "):
        HFModel(name_or_path=str(tmp_path), config={"rope_theta": 5.0}).read_config()
    given = {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}
    made = HFModel(name_or_path=str(tmp_path), config=given).read_config()
    assert made.rope_parameters["full_attention"] == {"rope_type": "default", "rope_theta": 5.0}
    assert made.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0


def test_frozen_parts_keep_their_weights_and_are_not_in_checkpoints(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in built().named_parameters()}
    made = trainer(tmp_path, model={"freeze": ["*.embed_tokens.*", "*.layers.0.*"]}, max_steps=3)
    seed = torch.random.get_rng_state()
    run = made.train()
    torch.random.set_rng_state(seed)
    frozen = {name for name, p in run.model.module.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in before if "embed_tokens" in name or "layers.0." in name}
    saved = load_file(tmp_path / "step-00000003" / "rank-00000.safetensors")
    assert "model/hf.lm_head.weight" in saved
    assert not {f"model/{name}" for name in frozen} & set(saved)
    again = trainer(tmp_path, model={"freeze": ["*.embed_tokens.*", "*.layers.0.*"]}, max_steps=3).train()
    for ours, theirs in zip(run.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
def test_adapters_are_trained_saved_and_gone_on_with(tmp_path: Path, tiny_model: Path) -> None:
    from peft import PeftModel

    def lora(folder: Path, **keys: Any) -> Any:
        made = trainer(folder, max_steps=6, **keys)
        made.model = HFModel(
            name_or_path=str(tiny_model), lora=LoRA(r=4, dropout=0.1, target_modules=["q_proj", "v_proj"])
        )
        return made

    run = lora(tmp_path / "whole").train()
    trained = {name for name, p in run.model.module.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    folder = tmp_path / "whole" / "huggingface"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, run.model.module.hf.eval()(ids).logits)
    lora(tmp_path / "cut", stop_after=3).train()
    lora(tmp_path / "cut").train()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_close_to_single(tmp_path: Path, precision: Any) -> None:
    trainer(tmp_path / "single", max_steps=4).train()
    trainer(tmp_path / "half", max_steps=4, precision=precision).train()
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "single"), rel=0.02)


HALVED = ("llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "gpt_oss", "deepseek_v3", "glm4_moe", "cohere2")


@pytest.mark.parametrize("kind", HALVED)
def test_bf16_true_casts_what_transformers_casts(tmp_path: Path, kind: str) -> None:
    from transformers import CONFIG_MAPPING

    config = tiny(CONFIG_MAPPING[kind]())
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    ours = halve(CausalLM(AutoModelForCausalLM.from_pretrained(tmp_path)), torch.bfloat16).hf
    kept = {name: tensor.dtype for name, tensor in theirs.named_parameters()}
    assert {name: tensor.dtype for name, tensor in ours.named_parameters()} == kept
    angles = {name: tensor for name, tensor in theirs.named_buffers() if "freq" in name or "bias" in name}
    assert angles
    for name, tensor in angles.items():
        torch.testing.assert_close(ours.get_buffer(name), tensor, rtol=0, atol=0)
    ids, far = torch.arange(3, 35)[None], torch.arange(4000, 4032)[None]
    with torch.no_grad():
        logits = [model.eval()(ids, position_ids=far).logits for model in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_no_strategy_rounds_rotary_angles(tmp_path: Path) -> None:
    strategies = ["Auto", "FSDP", *["DeepSpeed"] * bool(find_spec("deepspeed"))]
    keys = {"max_steps": 1, "micro_batch_size": 2, "checkpoint": [], "accelerator": "cpu", "devices": 2}
    on_two_ranks(
        tmp_path, "test_model", "import posttrain", f"for strategy in {strategies}:",
        "    for precision in ('bf16-true', 'bf16-mixed'):",
        "        chosen = {'strategy': getattr(posttrain, strategy)(), 'precision': precision}",
        f"        made = trainer(folder / strategy / precision, **chosen, **{keys})",
        "        angles = made.train().model.module.hf.model.rotary_emb.inv_freq.cpu()",
        "        torch.testing.assert_close(angles, built().hf.model.rotary_emb.inv_freq, rtol=0, atol=0)",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own ways
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_compiled_with_and_without_checkpointing(tmp_path: Path, checkpointing: bool) -> None:
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    torch._dynamo.register_backend(counting, name=f"counting-{checkpointing}")  # type: ignore[no-untyped-call]
    keys: dict[str, Any] = {"max_steps": 2, "checkpoint": []}
    model = {"compile": f"counting-{checkpointing}", "activation_checkpointing": checkpointing}
    trainer(tmp_path / "compiled", model=model, **keys).train()
    assert sum(graphs) > 40
    trainer(tmp_path / "plain", **keys).train()
    assert losses(tmp_path / "compiled") == losses(tmp_path / "plain")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(checkpointing: bool) -> None:
    made = built(compile="eager", activation_checkpointing=checkpointing)
    copied = copy.deepcopy(made)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = copied.hf(ids).logits
        for parameter in made.hf.model.layers.parameters():
            parameter.zero_()
        torch.testing.assert_close(copied.hf(ids).logits, before, rtol=0, atol=0)


def test_a_token_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"token \d+.*vocabulary of 50"):
        trainer(tmp_path, model={"config": {"vocab_size": 50}}).train()


def test_liger_patches_the_model_but_not_its_loss_and_says_where_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against its interface alone: the kernels need a GPU."""
    import sys
    from types import ModuleType

    def build(**keys: Any) -> Any:
        return built(liger=True, config={**LLAMA, **keys})

    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(RecipeError, match=r"pip install 'posttrain\[liger\]'"):
        build()
    calls: list[dict[str, Any]] = []
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **keys: calls.append(keys)}  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    with pytest.raises(RecipeError, match="run on GPUs"):
        build()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = build()
    assert calls == [{"model": made.hf, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(RecipeError, match="does not know models of type 'qwen2'"):
        build(model_type="qwen2")


def test_the_models_own_tokenizer_comes_from_where_the_model_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[dict[str, Any]] = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append({"name": name, **options})
        return byte_tokenizer()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setenv("A_TOKEN", "hunter2")
    model = HFModel(name_or_path="a/b", revision="v1", trust_remote_code=True, token=Secret("A_TOKEN"))
    HFTokenizer().build(model)
    HFTokenizer(name_or_path="a/b", revision="v2").build(model)
    HFTokenizer(name_or_path="c/d").build(model)
    own = {"name": "a/b", "revision": "v1", "token": "hunter2", "trust_remote_code": True}
    other = {"name": "c/d", "revision": None, "token": None, "trust_remote_code": False}
    assert asked == [own, {**own, "revision": "v2"}, other]


def test_the_commit_of_a_model_is_asked_as_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(_commit_hash="abc")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    found = HFModel(name_or_path="a/b", revision="v1", trust_remote_code=True).fingerprint()
    assert asked == {"revision": "v1", "token": None, "trust_remote_code": True}
    assert found is not None and found.endswith(" abc")


def test_the_best_model_is_kept(tmp_path: Path) -> None:
    """By the evaluation that was lowest: the rate is so high that later ones are worse."""
    from posttrain.blocks.callbacks import KeepBest
    from posttrain.hooks import after

    weights: dict[int, torch.Tensor] = {}
    losses_: dict[int, float] = {}

    @after("trainer.evaluate")
    def note(trainer: Any, found: dict[str, float]) -> None:
        weights[trainer.run.step] = trainer.run.model.module.hf.lm_head.weight.detach().clone()
        losses_[trainer.run.step] = found["eval_loss"]

    made = trainer(
        tmp_path, max_steps=12, eval_every=2, eval_rows=8, optimizer=AdamW(lr=0.1), scheduler=Constant(), packing=False
    )
    made.callbacks = [KeepBest()]
    made.train(callbacks=[note])
    best = min(losses_, key=lambda step: losses_[step])
    assert best < 12
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface-best")
    torch.testing.assert_close(exported.lm_head.weight, weights[best], rtol=0, atol=0)
    assert made.run.memory["keep-best"] == losses_[best]
    with pytest.raises(RecipeError, match="keep-best compares 'eval_x', but there is only eval_loss"):
        wrong = trainer(tmp_path / "wrong", max_steps=2, eval_every=2, eval_rows=8)
        wrong.callbacks = [KeepBest(metric="eval_x")]
        wrong.train()
