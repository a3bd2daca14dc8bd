"""SwiftKV: the student begins as its teacher, only its weights are trained, and inference saves what the formulas say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_metrics, assert_same_run
from toy import LLAMA, document, losses, metrics, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.blocks.layout import lay
from posttrain.blocks.losses.cross_entropy import divergence_sum
from posttrain.blocks.models.documents import attention as registered  # noqa: F401 - under the name `packed`
from posttrain.blocks.models.documents.attention import CACHE
from posttrain.blocks.models.lora import LoRA
from posttrain.blocks.models.swiftkv.config import FAMILIES, cache_bytes, prefill_flops
from posttrain.blocks.models.swiftkv.model import SwiftKVModel
from posttrain.blocks.models.swiftkv.modeling import family, start_from_teacher
from posttrain.blocks.optimizer import AdamW
from posttrain.errors import RecipeError
from posttrain.trainers.swiftkv import SwiftKVTrainer

SMALL = {**LLAMA, "num_hidden_layers": 6}


def config_of(kind: str, **keys: Any) -> dict[str, Any]:
    own = {"qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}}
    return {**SMALL, **own.get(kind, {}), "model_type": kind, **keys}


def student(kind: str, k: int, g: int, spread: float = 0.3) -> Any:
    """A network whose student has weights of its own, in evaluation mode."""
    made, causal = family(kind)
    said = {key: value for key, value in config_of(kind).items() if key != "model_type"}
    torch.manual_seed(0)
    hf = causal(made(**said, num_key_value_layers=k, key_value_group_size=g)).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, spread)
    return hf


def swiftkv(folder: Path, **keys: Any) -> SwiftKVTrainer:
    model = {"config": {"num_hidden_layers": 6}, "num_key_value_layers": 2, "key_value_group_size": 2}
    keys = {"rows": 60, "max_steps": 5, "model": {**model, **keys.pop("model", {})}, **keys}
    made: SwiftKVTrainer = trainer(folder, SwiftKVTrainer, **keys)
    return made


# -- definition -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_every_layers_own_input_the_student_would_be_the_teacher(kind: str) -> None:
    """Layers below k are the same; one layer above k, whose input is what keys and values are made of, is too."""
    hf = student(kind, k=5, g=1)
    start_from_teacher(hf)
    ids = torch.randint(3, 97, (2, 9), generator=torch.manual_seed(1))
    ours = hf(ids, use_cache=False).logits
    hf.config.swiftkv = False
    torch.testing.assert_close(ours, hf(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_teacher_in_it_is_the_base_model(kind: str) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(kind))).eval()
    hf = student(kind, k=2, g=2)
    missing, unexpected = hf.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    assert all("_swiftkv" in name for name in missing)
    hf.config.swiftkv = False
    ids = torch.randint(3, 97, (2, 9), generator=torch.manual_seed(1))
    torch.testing.assert_close(hf(ids).logits, base(ids).logits, rtol=1e-6, atol=1e-6)


def test_the_student_computes_what_its_definition_says() -> None:
    """Written out for one sequence: h of layer k, one norm, keys and values per group, the teacher's outputs and MLPs."""
    hf = student("llama", k=2, g=2)
    model, ids = hf.model, torch.randint(3, 97, (1, 7), generator=torch.manual_seed(1))

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [1, heads, width, size]
        cos, sin = model.rotary_emb(x, torch.arange(7)[None])
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, 7, -1, 8).transpose(1, 2)

    hf.config.swiftkv = False
    h = hf(ids, output_hidden_states=True).hidden_states[2]
    hf.config.swiftkv = True
    shared, keys, values = model.norm_swiftkv(h), None, None
    for index in range(2, 6):
        layer, attention = model.layers[index], model.layers[index].self_attn
        if index in (2, 4):
            keys, values = rotated(heads(attention.k_proj_swiftkv(shared))), heads(attention.v_proj_swiftkv(shared))
        query = rotated(heads(attention.q_proj_swiftkv(layer.input_layernorm(h))))
        out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)  # type: ignore[arg-type]
        h = h + attention.o_proj(out.transpose(1, 2).flatten(2))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    torch.testing.assert_close(hf(ids).logits, hf.lm_head(model.norm(h)), rtol=1e-5, atol=1e-5)


def test_keys_and_values_start_as_the_mean_over_their_group() -> None:
    hf = student("qwen2", k=2, g=2)  # with biases
    start_from_teacher(hf)
    layers = [layer.self_attn for layer in hf.model.layers]
    for name in ("weight", "bias"):
        mean = (getattr(layers[4].v_proj, name) + getattr(layers[5].v_proj, name)) / 2
        torch.testing.assert_close(getattr(layers[4].v_proj_swiftkv, name), mean)
        torch.testing.assert_close(getattr(layers[5].q_proj_swiftkv, name), getattr(layers[5].q_proj, name))
    assert not hasattr(layers[5], "k_proj_swiftkv")
    torch.testing.assert_close(hf.model.norm_swiftkv.weight, hf.model.layers[2].input_layernorm.weight)


# -- inference ------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
def test_generation_with_early_exit_equals_the_full_forward(kind: str, group: int, attention: str) -> None:
    """Prompts of different lengths, padded on the left."""
    hf = student(kind, k=2, g=group)
    hf.set_attn_implementation(attention)
    ids = torch.randint(3, 97, (3, 11), generator=torch.manual_seed(2))
    ids[0, :4], ids[2, :1] = 0, 0
    mask = (ids != 0).long()
    rows: list[int] = []
    for index in (1, 5):
        hf.model.layers[index].register_forward_pre_hook(lambda layer, args: rows.append(args[0].shape[1]))
    found = hf.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert rows == [11, 1] + [1, 1] * 5  # a lower and an upper layer
    mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    full = hf(found.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 10:-1]
    ours = torch.stack(found.logits, 1)
    torch.testing.assert_close(ours / full.abs().max(), full / full.abs().max(), rtol=0, atol=1e-5)


def cached(cache: Any) -> int:
    return sum(
        x.numel() * x.element_size()
        for layer in cache.layers
        if layer.is_initialized
        for x in (layer.keys, layer.values)
    )


@pytest.mark.parametrize(("k", "g"), [(3, 1), (2, 2), (2, 4), (3, 3)])
def test_operations_and_cache_are_what_the_formulas_say(k: int, g: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hf, tokens = student("llama", k, g), 50
    hf.set_attn_implementation("eager")  # counted like a matrix product
    ids = torch.randint(3, 97, (1, tokens))
    for last_row in (True, False):
        hf.config.swiftkv = last_row
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            cache = hf(ids, use_cache=True, logits_to_keep=1)[CACHE]
        assert counter.get_total_flops() == prefill_flops(hf.config, tokens, last_row)
        assert cached(cache) == tokens * cache_bytes(hf.config, 4, swiftkv=last_row)


def test_an_8b_model_saves_half_of_the_prefill_and_a_share_of_the_cache() -> None:
    shape = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    made, _ = family("llama")
    expected = {1: (0.518, 1.0), 2: (0.509, 0.75), 4: (0.505, 0.625)}
    for group, (flops, cache) in expected.items():
        config = made(**shape, num_key_value_layers=16, key_value_group_size=group)
        assert prefill_flops(config, 2048) / prefill_flops(config, 2048, last_row=False) == pytest.approx(
            flops, abs=1e-3
        )
        assert cache_bytes(config, 2) / cache_bytes(config, 2, swiftkv=False) == pytest.approx(cache)


# -- training -------------------------------------------------------------------------


def test_the_divergence_and_its_slopes_are_those_of_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.blocks.losses import cross_entropy as blocks_losses

    torch.manual_seed(0)
    student_, teacher, head = torch.randn(150, 8, requires_grad=True), torch.randn(150, 8), torch.randn(40, 8)
    monkeypatch.setattr(blocks_losses, "chunk_rows", lambda head: 64)
    found, same = divergence_sum(student_, teacher, head, 2.0)
    p, q = ((x @ head.t() / 2).softmax(-1) for x in (teacher, student_))
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert same == (p.argmax(-1) == q.argmax(-1)).sum()
    (ours,), (theirs,) = (torch.autograd.grad(3 * x, student_) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_probabilities_that_vanish_give_no_nan() -> None:
    hidden = torch.tensor([[400.0]], requires_grad=True)
    found, _ = divergence_sum(hidden, torch.tensor([[-400.0]]), torch.tensor([[1.0], [-1.0]]), 1.0)
    (slope,) = torch.autograd.grad(found, hidden)
    assert found.isfinite()
    assert slope.isfinite()


@pytest.mark.parametrize("arctic", [True, False])
def test_the_loss_is_that_of_its_definition(tmp_path: Path, arctic: bool) -> None:
    """Each document alone, with full logits and hidden states."""
    made = swiftkv(tmp_path, arctic_masks=arctic, max_steps=1, temperature=1.5, hidden_loss_mult=0.7)
    net: Any = SwiftKVModel(
        name_or_path="toy", random_init=True, config=config_of("llama"), num_key_value_layers=2, key_value_group_size=2
    ).build(None)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2)
    found = [[document(1), document(2)], [document(3)]]
    batch = lay(found, 0)
    made.run = type("Run", (), {})()  # type: ignore[assignment]
    made.run.model, made.run.log = net, lambda **values: None  # type: ignore[assignment,method-assign]
    (batch,) = made.together([batch])
    ours = made.loss(batch)
    hf, divergence, squared, tokens, trained = net.hf, 0.0, 0.0, 0, 0
    hf.set_attn_implementation("eager")
    for ids, mask in (one for row in found for one in row):
        states, logits = [], []
        for on in (True, False):
            hf.config.swiftkv = on
            out = hf(torch.tensor(ids)[None], use_cache=False, output_hidden_states=True)
            states.append(out.hidden_states[-2][0])
            logits.append((out.logits[0] / 1.5).log_softmax(-1))
        hf.config.swiftkv = True
        q, p = logits
        each, error = (p.exp() * (p - q)).sum(-1), ((states[0] - states[1]) ** 2).mean(-1)
        at = torch.tensor(mask)
        if arctic:
            at = at & (torch.arange(len(at)) > 0)
            divergence, squared = divergence + each[at].sum(), squared + error.sum()
        else:
            divergence, squared = divergence + each[:-1][at[1:]].sum(), squared + error[:-1][at[1:]].sum()
        tokens, trained = tokens + len(ids), trained + int(at[1:].sum())
    weight = tokens if arctic else trained
    expected = (1.5**2 * divergence + 0.7 * squared) / weight
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_only_the_student_is_trained_and_comes_closer_to_the_teacher(tmp_path: Path) -> None:
    made = swiftkv(tmp_path, max_steps=60, optimizer=AdamW(lr=3e-3))
    run = made.train()
    trained = {name for name, p in run.model.module.named_parameters() if p.requires_grad}
    assert trained
    assert all("_swiftkv" in name for name in trained)
    fresh = swiftkv(tmp_path / "fresh", max_steps=1, optimizer=AdamW(lr=1e-9)).train()
    begun = dict(fresh.model.module.named_parameters())
    for name, parameter in run.model.module.named_parameters():
        if name not in trained:
            torch.testing.assert_close(parameter, begun[name], rtol=0, atol=0)
    found = metrics(tmp_path)
    assert found[-1]["loss"] < found[0]["loss"] / 2
    assert found[-1]["agreement"] > found[0]["agreement"]


@pytest.mark.parametrize("arctic", [True, False])
def test_cutting_a_step_changes_nothing(tmp_path: Path, arctic: bool) -> None:
    keys = {"eval_rows": 9, "eval_every": 2, "arctic_masks": arctic}
    whole = swiftkv(tmp_path / "whole", **keys).train()
    cut = swiftkv(tmp_path / "cut", micro_batch_size=1, gradient_accumulation_steps=4, **keys).train()
    assert_same_run(whole, cut)
    assert_same_metrics(tmp_path / "whole", tmp_path / "cut")


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = swiftkv(tmp_path / "plain").train()
    assert_same_run(plain, swiftkv(tmp_path / "again", model={"activation_checkpointing": True}).train())


def test_the_export_has_snowflakes_names_and_goes_on_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = swiftkv(tmp_path, optimizer=AdamW(lr=1e-2)).train()
    folder = tmp_path / "huggingface"
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == ["LlamaSwiftKVForCausalLM"]
    assert (said["model_type"], said["num_key_value_layers"], said["key_value_group_size"]) == ("llama_swiftkv", 2, 2)
    names = set(load_file(folder / "model.safetensors"))
    projections = {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(6) for n in "qkvo"}
    student_ = {f"model.layers.{i}.self_attn.q_proj_swiftkv.weight" for i in (2, 3, 4, 5)}
    student_ |= {f"model.layers.{i}.self_attn.{n}_proj_swiftkv.weight" for i in (2, 4) for n in "kv"}
    assert projections | student_ | {"model.norm_swiftkv.weight"} <= names
    assert {name for name in names if "swiftkv" in name} == student_ | {"model.norm_swiftkv.weight"}
    ids = torch.randint(3, 97, (2, 9))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded(ids).logits, run.model.module.hf(ids).logits, rtol=1e-5, atol=1e-6)
    again: Any = SwiftKVModel(name_or_path=str(folder)).build(None)  # type: ignore[arg-type]
    torch.testing.assert_close(again.hf(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-6)


def test_a_run_in_pieces_equals_a_run_in_one(tmp_path: Path) -> None:
    swiftkv(tmp_path / "whole", max_steps=4).train()
    for _ in range(2):
        swiftkv(tmp_path / "cut", max_steps=4, stop_after=2).train()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "k of all layers": ({"num_key_value_layers": 6}, "num_key_value_layers must be 1 to 5"),
    "no group": ({"num_key_value_layers": 2, "key_value_group_size": 3}, "4 upper layers cannot share by 3"),
    "another family": (
        {"config": {"model_type": "gpt_neox", "num_hidden_layers": 2}},
        "knows llama, mistral, qwen2, qwen3",
    ),
    "a sliding window": ({"config": config_of("mistral", sliding_window=8)}, "sliding_window: null"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_distilled_is_refused(name: str) -> None:
    keys, message = WRONG[name]
    block = SwiftKVModel(**{"name_or_path": "toy", "random_init": True, "config": SMALL, **keys})
    with pytest.raises(RecipeError, match=message):
        block.build(None)  # type: ignore[arg-type]


def test_adapters_have_no_place_here() -> None:
    ((field, message),) = SwiftKVModel(name_or_path="toy", lora=LoRA()).check()
    assert (field, "student" in message) == ("lora", True)
