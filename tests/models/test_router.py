"""The loss that balances experts: transformers' own for a document, and the same however a step is cut."""

import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from architectures import ROWS
from ranks import on_two_ranks
from toy import LLAMA, metrics, trainer
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from posttrain import DPOTrainer, HFModel, LoRA
from posttrain.blocks.layout import lay
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.errors import RecipeError

KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "jamba")


def model(kind: str = "mixtral", **keys: Any) -> HFModel:
    config = tiny(AutoConfig.for_model(kind), vocabulary=97)
    said = {"model_type": kind, **{k: v for k, v in config.to_dict().items() if k != "model_type"}}
    return HFModel(**{"name_or_path": "toy", "random_init": True, "config": said, "router_aux_loss": 0.3, **keys})


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers_loss_of_each_document(kind: str) -> None:
    torch.manual_seed(0)
    net: Any = model(kind).build(None)  # type: ignore[arg-type]
    net.eval()
    net(lay(ROWS, 0))
    term, expected, tokens = net.terms["router"], 0.0, 0
    config = net.base.config
    experts = (net.terms and getattr(config, "num_local_experts", None)) or config.num_experts
    for ids, _ in (document for row in ROWS for document in row):
        with torch.no_grad():
            found = net.base(input_ids=torch.from_numpy(ids)[None], output_router_logits=True, use_cache=False)
        logits = tuple(one for one in found.router_logits if one is not None)
        expected += len(ids) * float(load_balancing_loss_func(logits, experts, config.num_experts_per_tok))
        tokens += len(ids)
    assert (term.count, term.weight) == ("tokens", 0.3)
    assert term.sum.item() == pytest.approx(expected, rel=1e-5)
    assert expected / tokens >= config.num_experts_per_tok  # 1 for each expert of a token would be balanced


def test_the_z_loss_is_its_formula_and_pads_take_no_part() -> None:
    torch.manual_seed(0)
    net: Any = model(router_aux_loss=0.0, router_z_loss=0.01).build(None)  # type: ignore[arg-type]
    net.eval()
    net(lay(ROWS, 0))
    assert list(net.terms) == ["router_z"]
    expected = 0.0
    for ids, _ in (document for row in ROWS for document in row):
        with torch.no_grad():
            found = net.base(input_ids=torch.from_numpy(ids)[None], output_router_logits=True, use_cache=False)
        layers = [one.exp().sum(-1).log() ** 2 for one in found.router_logits]
        expected += float(sum(layers).sum() / len(layers))  # type: ignore[union-attr, arg-type]
    assert net.terms["router_z"].sum.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RecipeError, match="router_z_loss: LlamaForCausalLM has no routers"):
        HFModel(name_or_path="toy", random_init=True, config=LLAMA, router_z_loss=0.1).build(None)  # type: ignore[arg-type]


def test_a_term_does_not_change_in_which_type_a_model_is_exported(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny(AutoConfig.for_model("mixtral"), vocabulary=97)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    net: Any = HFModel(name_or_path=str(tmp_path), router_aux_loss=0.3).build(None)  # type: ignore[arg-type]
    net(lay(ROWS, 0))
    assert net.terms["router"].weight == 0.3
    assert net.saved_as == "bfloat16"


def run_of(folder: Path, method: Any = None, block: HFModel | None = None, **keys: Any) -> Any:
    made = trainer(folder, **({"method": method} if method else {}), eval_rows=5, eval_every=3, max_steps=3, **keys)
    return attrs.evolve(made, model=block or model()).train()


@pytest.mark.parametrize("packing", [True, False])
def test_it_does_not_depend_on_the_cut(tmp_path: Path, packing: bool) -> None:
    run = run_of(tmp_path / "whole", packing=packing)
    run_of(tmp_path / "cut", packing=packing, micro_batch_size=1, gradient_accumulation_steps=4)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-4)
    assert run.last["router"] > 0
    assert run.last["eval_router"] > 0


def test_it_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    run_of(tmp_path / "one", block=model(router_z_loss=0.1))
    call = "run_of(folder, devices=2, micro_batch_size=2, block=model(router_z_loss=0.1))"
    on_two_ranks(tmp_path, "test_router", call)
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-4)


def test_it_teaches_the_routers_and_recomputing_activations_changes_nothing(tmp_path: Path) -> None:
    plain = run_of(tmp_path / "plain")
    again = run_of(tmp_path / "again", block=model(activation_checkpointing=True))
    without = run_of(tmp_path / "without", block=model(router_aux_loss=0.0))
    routers = [name for name, _ in plain.model.named_parameters() if "gate.weight" in name or "router" in name]
    assert routers
    kept, same, other = (dict(run.model.named_parameters()) for run in (plain, again, without))
    for name in routers:
        torch.testing.assert_close(kept[name], same[name])
        assert not torch.equal(kept[name], other[name])
    assert "router" not in without.last


@pytest.mark.parametrize(
    "keys", [{}, {"lora": LoRA(r=2, alpha=4, target_modules=["q_proj", "v_proj"])}], ids=["copy", "adapters"]
)
def test_a_reference_adds_nothing(tmp_path: Path, keys: dict[str, Any]) -> None:
    run = run_of(tmp_path, DPOTrainer, model(**keys), beta=0.1)
    assert run.last["loss"] == pytest.approx(run.last["loss"])
    first = metrics(tmp_path)[0]
    assert first["loss"] - 0.3 * first["router"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_configuration_says_whether_it_counts() -> None:
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    said = model(router_aux_loss=None).config
    assert model(router_aux_loss=None).build(None).router_weight == 0  # type: ignore[arg-type,union-attr]
    assert model(router_aux_loss=None, config=said | asked).build(None).router_weight == 0.02  # type: ignore[arg-type,union-attr]


def test_a_model_without_routers_has_no_such_loss() -> None:
    with pytest.raises(RecipeError, match=r"router_aux_loss: LlamaForCausalLM has no routers"):
        model("llama").build(None)  # type: ignore[arg-type]


# -- load, and balancing without a loss -------------------------------------------------


def load_of(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("expert_load/")}


RECOMPUTED = {"activation_checkpointing": True}


@pytest.mark.parametrize(("kind", "way"), [("mixtral", {}), ("mixtral", RECOMPUTED), ("gpt_oss", {})])
def test_the_load_of_experts_is_what_their_routers_chose_for_tokens_that_are_no_padding(
    kind: str, way: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    net: Any = model(kind, router_aux_loss=0.0, **way).build(None)  # type: ignore[arg-type]
    net(lay(ROWS, 0)).backward()
    found = net.after_update(lambda x: x, made=True)
    expected = torch.zeros(len(net.load.found), 4)
    for ids, _ in (document for row in ROWS for document in row):
        with torch.no_grad():
            given = net.base(input_ids=torch.from_numpy(ids)[None], output_router_logits=True, use_cache=False)
        for layer, logits in enumerate(given.router_logits):
            expected[layer] += logits.topk(2).indices.flatten().bincount(minlength=4)
    assert int(expected[0].sum()) == 2 * sum(len(ids) for row in ROWS for ids, _ in row)
    loads = expected / expected.mean(-1, keepdim=True)
    assert found["expert_load/most"] == loads.max() and found["expert_load/least"] == loads.min()
    for i in range(4):
        assert found[f"expert_load/{i}"].item() == pytest.approx(loads[:, i].mean().item() / 4)
    assert net.after_update(lambda x: x, made=True) == {}  # a new step


BIASED = ("deepseek_v3", "afmoe", pytest.param("minimax_m2", marks=pytest.mark.slow))
"""A buffer of the gate, a parameter beside it that is not trained, and a buffer of the whole."""


def biases(run: Any) -> torch.Tensor:
    return torch.cat([one.bias.flatten() for one in run.model.module.load.found])


@pytest.mark.parametrize("kind", BIASED)
def test_biases_move_once_for_each_step_toward_an_even_load(tmp_path: Path, kind: str) -> None:
    """However the step is cut; and the export holds them by their own names."""
    runs = []
    for name, cut in (("whole", {}), ("cut", {"micro_batch_size": 1, "gradient_accumulation_steps": 4})):
        block = model(kind, router_aux_loss=None, router_bias_rate=0.01)
        runs.append(run_of(tmp_path / name, block=block, **cut))
    whole, cut = (biases(run) for run in runs)
    assert torch.equal(whole, cut)
    assert whole.abs().max() <= 0.0301 and len(whole.unique()) > 1
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "cut"), strict=True):
        assert load_of(one) == load_of(other)
    before = whole.clone()
    load = runs[0].model.module.load
    load.totals = [torch.tensor([4.0, 1.0, 2.0, 1.0]) for _ in load.found]
    load.taken(lambda x: 2 * x, moves=True)  # as if another rank had counted the same
    expected = 0.01 * torch.tensor([-1.0, 1.0, 0.0, 1.0]).repeat(len(load.found))
    torch.testing.assert_close(biases(runs[0]) - before, expected)
    load.totals = [torch.tensor([4.0, 1.0, 2.0, 1.0]) for _ in load.found]
    load.taken(lambda x: x, moves=False)  # an update that was left out
    torch.testing.assert_close(biases(runs[0]) - before, expected)
    names = {name for name in runs[0].model.module.base.state_dict() if name.endswith("_bias")}
    assert len(names) == len(load.found)


def test_biases_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    def block() -> HFModel:
        return model("deepseek_v3", router_aux_loss=None, router_bias_rate=0.01)

    whole = run_of(tmp_path / "whole", block=block())
    run_of(tmp_path / "cut", block=block(), stop_after=2)
    again = run_of(tmp_path / "cut", block=block())
    assert again.first_step == 2
    assert torch.equal(biases(whole), biases(again)) and biases(whole).abs().max() > 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_biases_even_the_load_out(tmp_path: Path) -> None:
    last = {}
    for rate in (0.0, 0.02):
        block = model("deepseek_v3", router_aux_loss=None, router_bias_rate=rate)
        made = attrs.evolve(trainer(tmp_path / str(rate), max_steps=20, rows=200), model=block)
        made.train()
        last[rate] = sum(line["expert_load/most"] for line in metrics(tmp_path / str(rate))[-5:]) / 5
    assert last[0.02] < last[0.0] - 0.05, last


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_the_load_is_counted_in_compiled_layers(tmp_path: Path) -> None:
    torch.compiler.reset()
    plain = run_of(tmp_path / "plain", block=model())
    way: dict[str, Any] = {"compile": "eager", "activation_checkpointing": True}
    run_of(tmp_path / "compiled", block=model(**way))
    assert "expert_load/most" in plain.last
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_biases_that_are_not_there_cannot_move() -> None:
    with pytest.raises(RecipeError, match="router_bias_rate: this model has no biases"):
        model(router_bias_rate=0.001).build(None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="router_bias_rate: the experts of this model, if it has any"):
        HFModel(name_or_path="toy", random_init=True, config=LLAMA, router_bias_rate=0.1).build(None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_load_and_biases_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    keys = "block=model('deepseek_v3', router_aux_loss=None, router_bias_rate=0.01)"
    run_of(tmp_path / "one", block=model("deepseek_v3", router_aux_loss=None, router_bias_rate=0.01))
    on_two_ranks(tmp_path, "test_router", f"run_of(folder, devices=2, micro_batch_size=2, {keys})")
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-4)
        assert load_of(one) == load_of(other) != {}
