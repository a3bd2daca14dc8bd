"""Preference training: the reference, the losses in the loop, packed pairs, and the same result however a step is cut."""

import json
import math
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_metrics, assert_same_run
from ranks import on_two_ranks
from toy import losses, metrics, network, pair, trainer

from posttrain.blocks.layout import Example, collate_pairs
from posttrain.blocks.losses.objective import LOSSES, preference_loss
from posttrain.blocks.models.model import HFModel, LoRA
from posttrain.blocks.optimizer import AdamW
from posttrain.errors import RecipeError
from posttrain.registry import block
from posttrain.runtime.launch import reseed
from posttrain.trainers.dpo import DPOTrainer

MIXES: list[Any] = ["sigmoid", "aot", "orpo", {"sigmoid": 1.0, "sft": 0.3}, {"aot": 0.5, "sft": 0.3, "ipo": 0.01}]


def dpo(folder: Path, **keys: Any) -> DPOTrainer:
    made: DPOTrainer = trainer(folder, DPOTrainer, **{"rows": 60, "max_steps": 5, **keys})
    return made


# -- the reference --------------------------------------------------------------------


def test_the_first_loss_is_ln_2_and_the_reference_stays_as_it_was(tmp_path: Path) -> None:
    run = dpo(tmp_path, optimizer=AdamW(lr=1e-2)).train()
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-7)
    first = metrics(tmp_path)[0]
    assert (first["rewards/margin"], first["rewards/chosen"]) == (0, 0)
    assert metrics(tmp_path)[-1]["rewards/margin"] > 0.01
    reference = run.frozen["reference"].module
    assert not reference.training
    reseed(42, -1, 0)
    fresh = network().build(None)
    for ours, first_weights in zip(reference.parameters(), fresh.parameters(), strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, first_weights.detach(), rtol=0, atol=0)


def test_a_policy_built_in_memory_by_a_subclass_is_its_own_reference(tmp_path: Path) -> None:
    """Loading `name_or_path` once more would give another model."""

    @block("model", "test-scaled")
    class Scaled(HFModel):
        def build(self, fabric: Any) -> Any:
            made = super().build(fabric)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.mul_(1.5)
            return made

    made = dpo(tmp_path, max_steps=1)
    made.model = network(Scaled)
    made.train()
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-7)


def test_a_reference_of_its_own_is_asked(tmp_path: Path) -> None:
    made = dpo(tmp_path, max_steps=1, reference=network(config={"num_hidden_layers": 1}))
    run = made.train()
    assert losses(tmp_path)[0] != pytest.approx(math.log(2), abs=1e-4)
    assert len(run.frozen["reference"].module.hf.model.layers) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
def test_with_adapters_the_reference_is_the_model_without_them(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"lora": LoRA(r=4, dropout=0.1)}
    run = dpo(tmp_path / "lora", model=lora, optimizer=AdamW(lr=1e-2)).train()
    assert losses(tmp_path / "lora")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert not list(run.frozen["reference"].parameters())  # no second copy
    batch = next(iter(run.loaders.train.batches(run.loaders.train.start())))[0]
    said = run.frozen["reference"](batch, "log_probs")
    assert not said.requires_grad
    assert run.model.module.training
    base = network().build(None)
    state = {
        k.replace("base_model.model.", "").replace(".base_layer", ""): v
        for k, v in run.model.module.state_dict().items()
    }
    base.load_state_dict({k: v for k, v in state.items() if "lora" not in k})
    torch.testing.assert_close(said, base.eval()(batch, "log_probs"), rtol=0, atol=1e-6)
    assert (run.model.module.eval()(batch, "log_probs") - said).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("init", ["pissa", "olora", False])
def test_adapters_that_begin_with_a_part_of_the_weights_have_a_copy_as_reference(tmp_path: Path, init: Any) -> None:
    pytest.importorskip("peft")
    lora = {"lora": LoRA(r=4, kwargs={"init_lora_weights": init})}
    run = dpo(tmp_path, model=lora, optimizer=AdamW(lr=1e-2)).train()
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics(tmp_path)[0]["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert list(run.frozen["reference"].parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_asking_the_reference_trains_no_adapter_that_the_recipe_freezes(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = {"lora": LoRA(r=4), "freeze": ["*lora_A*"]}
    run = dpo(tmp_path, model=model, optimizer=AdamW(lr=1e-2)).train()
    trained = {name.split(".")[-3] for name, p in run.model.module.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}


def test_a_recorded_reference_trains_the_same_and_is_asked_only_once(tmp_path: Path) -> None:
    asked = dpo(tmp_path / "asked", eval_rows=9, eval_every=2).train()
    recorded = dpo(tmp_path / "recorded", eval_rows=9, eval_every=2, precompute_reference=True).train()
    assert_same_run(asked, recorded)
    assert_same_metrics(tmp_path / "asked", tmp_path / "recorded")
    assert not recorded.frozen
    folders = list((tmp_path / "cache" / "recorded").iterdir())
    assert len(folders) == 2  # training and evaluation data
    before = {file: file.stat().st_mtime_ns for folder in folders for file in folder.iterdir()}
    padded = dpo(tmp_path / "again", eval_rows=9, eval_every=2, precompute_reference=True, packing=False, seed=42)
    padded.train()
    assert {file: file.stat().st_mtime_ns for file in before} == before  # any packing reads the same numbers
    dpo(tmp_path / "other", eval_rows=9, precompute_reference=True, seed=1).train()  # other weights
    assert len(list((tmp_path / "cache" / "recorded").iterdir())) == 4


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft still says gradient checkpointing
def test_recordings_of_models_without_their_adapters_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for seed in (1, 2):  # other weights
        keys = {"model": {"lora": LoRA(r=4)}, "seed": seed, "max_steps": 2}
        dpo(tmp_path / f"asked-{seed}", **keys).train()
        dpo(tmp_path / f"recorded-{seed}", precompute_reference=True, **keys).train()
        assert losses(tmp_path / f"recorded-{seed}") == pytest.approx(losses(tmp_path / f"asked-{seed}"), abs=1e-6)
    assert len(list((tmp_path / "cache" / "recorded").iterdir())) == 2


def test_a_recording_that_was_broken_off_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.blocks.data import recorded

    monkeypatch.setattr(recorded, "CHUNK", 8)
    real, calls = recorded.Recorder._asked, []

    def dies(self: Any, loader: Any, indices: range, *rest: Any) -> Any:
        calls.append(indices.start)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, loader, indices, *rest)

    monkeypatch.setattr(recorded.Recorder, "_asked", dies)
    with pytest.raises(KeyboardInterrupt):
        dpo(tmp_path / "broken", precompute_reference=True).train()
    dpo(tmp_path / "recorded", precompute_reference=True).train()
    assert calls == [0, 8, 16, 24, 24, 32, 40, 48, 56]
    dpo(tmp_path / "asked").train()
    assert losses(tmp_path / "recorded") == pytest.approx(losses(tmp_path / "asked"), abs=1e-6)


# -- equivalence ----------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("loss", MIXES, ids=str)
def test_cutting_a_step_changes_neither_loss_nor_metrics(tmp_path: Path, loss: Any, packing: bool) -> None:
    keys = {"loss_type": loss, "packing": packing, "eval_rows": 11, "eval_every": 2}
    whole = dpo(tmp_path / "whole", micro_batch_size=4, **keys).train()
    cut = dpo(tmp_path / "cut", micro_batch_size=1, gradient_accumulation_steps=4, **keys).train()
    assert_same_run(whole, cut)
    assert_same_metrics(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("loss", MIXES, ids=str)
def test_a_rank_that_has_run_out_of_pairs_changes_no_evaluation(tmp_path: Path, loss: Any) -> None:
    run = (method := dpo(tmp_path, loss_type=loss, eval_rows=7, max_steps=2)).train()
    expected, loader = method.evaluate(), run.loaders.eval
    assert loader is not None

    class Idle:
        """Has one batch more, which counts nothing, as the loader of a rank with fewer rows does."""

        def one_pass(self) -> Any:
            batches = list(loader.one_pass())
            return iter([*batches, batches[0].idle()])

    run.loaders = attrs.evolve(run.loaders, eval=Idle())
    assert method.evaluate() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_packed_pairs_train_like_padded_ones(tmp_path: Path, attention: str) -> None:
    """All pairs in every step: then packed and padded steps see the same ones."""
    keys = {"rows": 30, "loss_type": {"sigmoid": 1.0, "sft": 0.3}, "model": {"attn_implementation": attention}}
    rows = dpo(tmp_path / "rows", rows=30).data.build(None, 1, 0, 1, 42).train.rows(1)
    packed = dpo(tmp_path / "packed", micro_batch_size=rows, **keys).train()
    keys["model"] = {"attn_implementation": "eager"}
    padded = dpo(tmp_path / "padded", packing=False, micro_batch_size=10, gradient_accumulation_steps=3, **keys).train()
    assert_same_run(packed, padded)


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    keys = "eval_rows=11, eval_every=2, devices=2, micro_batch_size=1, gradient_accumulation_steps=2"
    each = "for number, loss in enumerate(MIXES):"
    train = f"dpo(folder / str(number), loss_type=loss, precompute_reference=number == 3, {keys}).train()"
    on_two_ranks(tmp_path, "test_dpo", f"{each} {train}")
    for number, loss in enumerate(MIXES):
        dpo(tmp_path / "one" / str(number), loss_type=loss, eval_rows=11, eval_every=2).train()
        assert_same_metrics(tmp_path / "one" / str(number), tmp_path / "two" / str(number))


def test_a_step_equals_plain_pytorch(tmp_path: Path) -> None:
    """Each side by itself, the loss as its equation is written, gradients of the mean over pairs."""
    pairs = [pair(seed) for seed in range(7)]
    batch = collate_pairs([pairs[:4], pairs[4:]])
    net = network(attn_implementation="packed").build(None)
    reference = network(config={"num_hidden_layers": 1}).build(None)
    made = dpo(tmp_path)
    made.run = type("Run", (), {})()  # type: ignore[assignment]
    made.run.model, made.run.frozen, made.run.log = net, {"reference": reference}, lambda **values: None  # type: ignore[method-assign,assignment]
    ours = made.loss(batch)
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()

    def summed(model: Any, side: Any) -> torch.Tensor:
        ids, mask = (torch.tensor(np.asarray(x)) for x in side)
        logits = model.hf(input_ids=ids[None], use_cache=False).logits[0, :-1]
        found = F.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
        return found[mask[1:]].sum()

    net.hf.set_attn_implementation("eager")
    theirs = torch.stack([
        -F.logsigmoid(0.1 * (
            (summed(net, p.documents[0]) - summed(reference, p.documents[0]).detach())
            - (summed(net, p.documents[1]) - summed(reference, p.documents[1]).detach())
        )) for p in pairs
    ]).mean()  # fmt: skip
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_prompts_are_computed_once_and_padding_never() -> None:
    pairs = [pair(seed) for seed in range(7)]
    batch = collate_pairs([pairs[:4], pairs[4:]])
    prompts = sum(int((~p.documents[0][1]).sum()) for p in pairs)
    computed = batch.branch.input_ids.numel()
    assert computed <= sum(map(len, pairs)) - prompts  # replies may begin alike, too
    assert batch["input_ids"].numel() > sum(map(len, pairs))
    seen: list[int] = []
    net = network().build(None)
    net.base.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    net(batch, "log_probs")
    assert seen == [computed]


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "mistral", "sliding_window": 6}], ids=["llama", "sliding window"]
)
def test_branches_give_what_whole_sides_give(config: dict[str, Any]) -> None:
    """Also where one side is the beginning of the other, and where nothing is shared."""
    ids, mask = pair(3).documents[0]
    odd = [
        Example(((ids, mask), (ids[:-1], mask[:-1]))),
        Example((pair(4).documents[0], pair(5).documents[1])),
        pair(6),
    ]
    batch = collate_pairs([odd])
    net = network(config=config).build(None)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    branched = net(batch, "log_probs")
    whole = net(batch.but(branch=None), "log_probs")
    torch.testing.assert_close(branched, whole, rtol=1e-5, atol=1e-5)


def test_a_run_in_pieces_equals_a_run_in_one(tmp_path: Path) -> None:
    whole = dpo(tmp_path / "whole", max_steps=6).train()
    for _ in range(3):
        cut = dpo(tmp_path / "cut", max_steps=6, stop_after=2).train()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(tmp_path: Path, name: str) -> None:
    dpo(tmp_path, loss_type=name, max_steps=2).train()
    assert all(map(math.isfinite, losses(tmp_path)))


# -- from recipes ---------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(6) for b in range(4)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def recipe(tmp_path: Path, model: Path, pairs: Path, more: str = "") -> Path:
    file = tmp_path / "dpo.yaml"
    file.write_text(f"""
type: dpo
model: {{name_or_path: {model}}}
data: {{sources: [{pairs}], max_length: 64, eval_split: 0.2}}
optimizer: {{lr: 1e-3}}
output_dir: {tmp_path / "run"}
accelerator: cpu
max_steps: 4
log_every: 1
{more}""")
    return file


def test_a_recipe_trains_and_exports(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    from transformers import AutoModelForCausalLM

    from posttrain.recipes import load as recipes

    run = recipes.load(recipe(tmp_path, tiny_model, pairs, "loss_type: {sigmoid: 1, sft: 0.1}\nbeta: 0.2"), []).train()
    assert run.status == "finished"
    assert run.last["eval_rewards/accuracy"] <= 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "huggingface")


def test_names_and_options_that_do_not_fit_are_said_together(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    from posttrain.recipes import load as recipes

    with pytest.raises(RecipeError) as error:
        recipes.load(recipe(tmp_path, tiny_model, pairs, "loss_type: sigmod\nbeta: -1\nlabel_smoothing: 0.7"), [])
    assert "beta: must be > 0" in str(error.value)
    assert "label_smoothing: must be < 0.5" in str(error.value)
    with pytest.raises(RecipeError, match=r"loss_type: there is no 'sigmod'; did you mean 'sigmoid'\?"):
        recipes.load(recipe(tmp_path, tiny_model, pairs, "loss_type: sigmod"), [])
    with pytest.raises(RecipeError, match="reference: simpo has no use for a reference model"):
        recipes.load(
            recipe(tmp_path, tiny_model, pairs, f"loss_type: simpo\nreference: {{name_or_path: {tiny_model}}}"), []
        )


WRONG = {
    "data: {type: sft, sources: [PAIRS]}": "data: this trainer needs pairs of replies",
    "loss_args: {beta: 0.3}": "loss_args: beta is a key of its own",
    "loss_args: {gama: 1}": "loss_args: sigmoid takes no 'gama'",
    "loss_type: {sigmoid: 0}": "loss_type: the weight of sigmoid must be > 0",
    "loss_type: [sft, sft]": "loss_type: names a loss twice",
    "reference: runs/sft": "a folder or hub name is written as {name_or_path: ...}",
}


@pytest.mark.parametrize("line", WRONG)
def test_values_that_contradict_are_said_under_their_key(
    tmp_path: Path, tiny_model: Path, pairs: Path, line: str
) -> None:
    from posttrain.recipes import load as recipes

    file = recipe(tmp_path, tiny_model, pairs)
    kept = [old for old in file.read_text().splitlines() if old.partition(":")[0] != line.partition(":")[0]]
    file.write_text("\n".join([*kept, line.replace("PAIRS", str(pairs))]))
    with pytest.raises(RecipeError, match=WRONG[line].replace("{", r"\{").replace("...", r"\.\.\.")):
        recipes.load(file, [])


def test_pairs_are_refused_by_trainers_of_documents(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    from posttrain.recipes import load as recipes

    text = recipe(tmp_path, tiny_model, pairs).read_text()
    for kind in ("sft", "causal"):
        (tmp_path / "x.yaml").write_text(
            text.replace("type: dpo", f"type: {kind}").replace("{sources", "{type: preference, sources")
        )
        with pytest.raises(RecipeError, match="data: this trainer needs single documents"):
            recipes.load(tmp_path / "x.yaml", [])


def test_a_loss_of_ones_own_is_one_function(tmp_path: Path) -> None:
    @preference_loss("test-linear")
    def linear(policy: Any, reference: Any, lengths: Any, *, beta: float = 0.5) -> Any:
        chosen, rejected = (policy - reference).unbind(-1)
        return -beta * (chosen - rejected)

    try:
        dpo(tmp_path, loss_type="test-linear", max_steps=3).train()
        found = metrics(tmp_path)
        assert found[-1]["loss"] == pytest.approx(-found[-1]["rewards/margin"], abs=1e-6)
    finally:
        del LOSSES["test-linear"]
