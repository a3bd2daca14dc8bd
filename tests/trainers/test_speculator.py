"""MLP speculators: what they compute, both stages of training, the files that servers read, and drafts that change nothing."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_metrics
from toy import LLAMA, VOCABULARY, document, losses, metrics, network, trainer

import posttrain.hooks as hooks
from posttrain.blocks.layout import lay
from posttrain.blocks.models.model import HFModel, LoRA
from posttrain.blocks.models.speculator.continuation import continued, prompts_of, with_positions
from posttrain.blocks.models.speculator.files import validate
from posttrain.blocks.models.speculator.model import SpeculatorModel
from posttrain.blocks.models.speculator.network import MLPSpeculator, load_speculator
from posttrain.blocks.models.speculator.speculate import speculate
from posttrain.blocks.optimizer import AdamW
from posttrain.blocks.scheduler import TwoStage
from posttrain.errors import CheckpointError, RecipeError, TrainingError
from posttrain.registry import lookup
from posttrain.trainers.mlp_speculator import SpeculatorTrainer
from posttrain.trainers.sft import SFTTrainer


def spec(folder: Path, **keys: Any) -> SpeculatorTrainer:
    model = {"inner_dim": 16, "n_predict": 3}
    keys = {"rows": 60, "max_steps": 5, "model": {**model, **keys.pop("model", {})}, **keys}
    made: SpeculatorTrainer = trainer(folder, SpeculatorTrainer, **keys)
    return made


def network_of(**keys: Any) -> Any:
    torch.manual_seed(0)
    net = network(SpeculatorModel, **{"inner_dim": 16, **keys}).build(None)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    return net


# -- definition -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_each_head_computes_what_its_definition_says(tied: bool, scale: bool) -> None:
    """The recurrence of fms-extras, written out with the tensors that are exported."""
    speculator = network_of(tie_weights=tied, scale_input=scale).speculator
    t = speculator.state_dict()
    hidden, tokens = torch.randn(4, 32), torch.randint(97, (4, 3))

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    state_weight = 0.5 ** (0.5 / 3)
    token_weight = math.sqrt((1 - state_weight**2) * 16 / 2)
    state = rms(hidden) / math.sqrt(2) if scale else hidden
    ours = speculator.start(hidden)
    for i in range(3):
        mixed = state_weight * (state @ t[f"proj.{i}.weight"].t()) + token_weight * t[f"emb.{i}.weight"][tokens[:, i]]
        state = F.gelu(t[f"ln.{i}.weight"] * rms(mixed) + t[f"ln.{i}.bias"])
        ours = speculator.state(i, ours, tokens[:, i])
        torch.testing.assert_close(ours, state, rtol=1e-4, atol=1e-5)
    drafted = speculator.draft(hidden, tokens[:, 0], 1)
    first = speculator.state(0, speculator.start(hidden), tokens[:, 0])
    assert drafted[:, 0].tolist() == (first @ t["head.0.weight"].t()).argmax(-1).tolist()


def test_it_starts_with_the_spread_of_its_width_and_shares_what_is_tied() -> None:
    config = SpeculatorModel(name_or_path="x", inner_dim=400, tie_weights=True).configuration_for(
        network().build(None).hf.config  # type: ignore[arg-type]
    )
    speculator = MLPSpeculator(config)
    assert speculator.emb[0].weight.std().item() == pytest.approx(400**-0.5, rel=0.05)
    assert speculator.proj[0].weight.std().item() == pytest.approx(400**-0.5, rel=0.1)
    assert len({id(head.weight) for head in speculator.head}) == len({id(emb.weight) for emb in speculator.emb}) == 1
    assert speculator.proj[1].weight is speculator.proj[2].weight is not speculator.proj[0].weight
    assert len({id(norm) for norm in speculator.ln}) == 1


def test_the_loss_is_that_of_its_definition(tmp_path: Path) -> None:
    """Each document alone: head i at t reads the hidden state at t and tokens t+1 to t+1+i, and predicts t+2+i."""
    net, found = network_of(), [[document(1), document(2)], [document(3)]]
    batch = with_positions(lay(found, 0), 3)
    made = spec(tmp_path)
    logged: dict[str, Any] = {}
    made.run = type("Run", (), {})()  # type: ignore[assignment]
    made.run.model, made.run.log = net.eval(), lambda **values: logged.update(values)  # type: ignore[assignment,method-assign]
    ours = made.loss(batch)
    sums, right, count = [0.0] * 3, [0] * 3, 0
    net.hf.set_attn_implementation("eager")
    for ids, mask in (one for row in found for one in row):
        hidden = net.hf.model(torch.tensor(ids)[None], use_cache=False).last_hidden_state[0]
        for t in range(len(ids) - 4):
            if not mask[t + 2 : t + 5].all():
                continue
            count, state = count + 1, net.speculator.start(hidden[t])
            for i in range(3):
                state = net.speculator.state(i, state, torch.tensor(ids[t + 1 + i]))
                log_probs = net.speculator.head[i](state).log_softmax(-1)
                sums[i] -= log_probs[ids[t + 2 + i]].item()
                right[i] += int(log_probs.argmax() == ids[t + 2 + i])
    assert count == batch["weight"] > 10
    assert ours.item() == pytest.approx(sum(sums) / count, rel=1e-4)
    for i in range(3):
        assert logged[f"loss/head_{i}"].item() == pytest.approx(sums[i] / count, rel=1e-4)
        assert logged[f"accuracy/head_{i}"].item() == pytest.approx(right[i] / count)


# -- training -------------------------------------------------------------------------


def test_only_the_speculator_is_trained_and_it_learns(tmp_path: Path) -> None:
    run = spec(tmp_path, max_steps=80, optimizer=AdamW(lr=1e-2), model={"scale_input": True}, eval_rows=9).train()
    trained = {name for name, p in run.model.module.named_parameters() if p.requires_grad}
    assert all(name.startswith("speculator.") for name in trained)
    assert trained
    assert not run.model.module.hf.training
    found = metrics(tmp_path)
    assert found[-1]["loss"] < found[0]["loss"] / 2
    assert found[-1]["eval_accuracy/head_0"] > 0.5


@pytest.mark.parametrize("stage", [1, 2])
def test_cutting_a_step_changes_nothing(tmp_path: Path, stage: int) -> None:
    """Stage 2 draws the same words only if it does not draw: it takes the likeliest."""
    keys: dict[str, Any] = {"eval_rows": 9, "eval_every": 2}
    if stage == 2:
        keys |= {
            "generate_from": 0,
            "gen_prompt_length": 5,
            "gen_seq_length": 12,
            "gen_temperature": 0,
            "gen_micro_batch": 7,
        }
    whole = spec(tmp_path / "whole", **keys).train()
    cut = spec(tmp_path / "cut", micro_batch_size=1, gradient_accumulation_steps=4, **keys).train()
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert_same_metrics(tmp_path / "whole", tmp_path / "cut")


def test_stage_2_goes_on_where_stage_1_ended_and_a_run_in_pieces_equals_one(tmp_path: Path) -> None:
    keys = {
        "generate_from": 2, "gen_prompt_length": 5, "gen_seq_length": 12, "max_steps": 4, "scheduler": TwoStage(stage_one=0.5),
    }  # fmt: skip
    continued_at: list[int] = []

    @hooks.after("trainer.continuation")
    def note(trainer: Any, batch: Any) -> None:
        continued_at.append(trainer.run.step)

    spec(tmp_path / "whole", **keys).train(callbacks=[note])
    assert continued_at == [2, 3]
    for _ in range(2):
        spec(tmp_path / "cut", stop_after=2, **keys).train()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_continuations_are_what_the_base_model_says(tmp_path: Path) -> None:
    run = spec(tmp_path, max_steps=1).train()
    batch = lay([[document(1), document(2)], [document(3)]], 0)
    options: dict[str, Any] = {
        "prompt_length": 5,
        "new_tokens": 8,
        "at_a_time": 2,
        "temperature": 0,
        "top_k": 1,
        "server": None,
    }
    made = continued(run, batch, **options)
    prompts = prompts_of(batch, 5)
    assert len(prompts) == sum(len(ids) // 5 for ids, _ in (document(n) for n in (1, 2, 3)))
    assert made["input_ids"].shape[0] == len(prompts)
    for row, prompt in zip(made["input_ids"].tolist(), prompts, strict=True):
        assert row[:5] == prompt
        expected = run.model.module.hf.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert row[: expected.shape[1]] == expected[0].tolist()
    with pytest.raises(TrainingError, match="gen_prompt_length=200"):
        continued(run, batch, **{**options, "prompt_length": 200})


def test_continuations_may_come_from_a_server(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        def answer(self, data: Any) -> None:
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "base"}]})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            choices = [{"index": i, "token_ids": [7, 8, 9, 10, 2]} for i in range(len(asked[-1]["prompt"]))]
            self.answer({"choices": choices[::-1]})

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        spec(tmp_path, max_steps=2, generate_from=0, gen_prompt_length=5, gen_seq_length=5, gen_server=url).train()
        assert asked[0]["max_tokens"] == 5
        assert asked[0]["model"] == "base"
        assert all(len(prompt) == 5 for prompt in asked[0]["prompt"])
        assert len({a["seed"] for a in asked}) == 2  # one a step
        assert losses(tmp_path)[0] > 0
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(TrainingError, match="gen_server is the base URL"):
        spec(tmp_path / "gone", generate_from=0, gen_prompt_length=5, gen_seq_length=5, gen_server=url).train()


def test_the_schedule_of_two_stages() -> None:
    factor = TwoStage(stage_one=0.5).factor(200)
    warming = [factor(step) for step in range(5)]
    assert warming == sorted(warming)
    assert warming[0] == pytest.approx(1 - (5 / 6) ** 2)
    assert factor(5) == 1.0
    assert factor(99) == pytest.approx(0.1, abs=1e-3)
    assert factor(100) == pytest.approx(0.1)
    assert factor(200) == pytest.approx(0.01)


def test_both_names_mean_the_same_trainer() -> None:
    assert lookup("trainer", "spec-decode") is lookup("trainer", "mlp-speculator") is SpeculatorTrainer


# -- files ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format_", ["ibm", "arctic"])
def test_the_export_is_what_servers_read(tmp_path: Path, tied: bool, format_: str) -> None:
    from safetensors.torch import load_file

    run = spec(tmp_path, model={"tie_weights": tied, "export": format_, "n_predict": 4}).train()
    folder = tmp_path / "huggingface"
    said = json.loads((folder / "config.json").read_text())
    arctic = "Arctic" if format_ == "arctic" else ""
    assert said["architectures"] == [f"{arctic}MLPSpeculatorPreTrainedModel"]
    assert (said["emb_dim"], said["inner_dim"], said["vocab_size"], said["n_predict"]) == (32, 16, VOCABULARY, 4)
    assert len(said["top_k_tokens_per_head"]) == 4
    assert ("base_model_archs" in said) == bool(arctic)
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {
        f"{part}.{i}.{kind}" for i in range(4)
        for part, kind in (("emb", "weight"), ("proj", "weight"), ("ln", "weight"), ("ln", "bias"), ("head", "weight"))
    }  # fmt: skip
    assert torch.equal(tensors["head.0.weight"], tensors["head.3.weight"]) == tied
    assert not validate(folder, run.model.module.hf.config)
    again = load_speculator(folder)
    hidden, token = torch.randn(2, 32), torch.tensor([5, 6])
    assert again.draft(hidden, token, 4).tolist() == run.model.module.speculator.draft(hidden, token, 4).tolist()


def test_what_is_wrong_with_an_export_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec(tmp_path).train()
    folder = tmp_path / "huggingface"
    tensors, said = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    del tensors["head.2.weight"]
    tensors["proj.1.weight"] = tensors["proj.1.weight"][:, :5].contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**said, "architectures": "x", "top_k_tokens_per_head": [3]}))
    found = " | ".join(validate(folder))
    for problem in (
        "architectures is not a list",
        "needs n_predict=3 entries",
        "head.2.weight is missing",
        "proj.1.weight has",
    ):
        assert problem in found
    with pytest.raises(CheckpointError, match=r"head\.2\.weight is missing"):
        load_speculator(folder)


def test_training_goes_on_from_an_export_and_another_base_model_is_refused(tmp_path: Path) -> None:
    spec(tmp_path / "one", optimizer=AdamW(lr=1e-2), max_steps=30).train()
    spec(tmp_path / "two", model={"speculator_path": tmp_path / "one" / "huggingface"}, max_steps=1).train()
    assert losses(tmp_path / "two")[0] < losses(tmp_path / "one")[0]
    other = network(SpeculatorModel, config={"hidden_size": 64}, speculator_path=str(tmp_path / "one" / "huggingface"))
    with pytest.raises(RecipeError, match="another base model: its emb_dim is 32, the model's hidden_size 64"):
        other.build(None)
    with pytest.raises(CheckpointError, match="not the configuration of"):
        load_speculator(tmp_path)


def test_values_that_contradict_are_said_before_anything_is_loaded() -> None:
    def found(**keys: Any) -> list[str]:
        return [field for field, _ in SpeculatorModel(name_or_path="x", **keys).check()]

    assert found() == []
    assert found(lora=LoRA()) == ["lora"]
    assert found(n_predict=1, tie_weights=True) == ["tie_weights"]
    assert found(n_predict=4, top_k_tokens_per_head=[1, 2]) == ["top_k_tokens_per_head"]


# -- drafts ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A base model that has learned the toy documents, and a speculator for it."""
    folder = tmp_path_factory.mktemp("trained")
    base = folder / "base" / "huggingface"
    trainer(folder / "base", SFTTrainer, rows=200, max_steps=150, optimizer=AdamW(lr=5e-3)).train()
    model = {"name_or_path": str(base), "random_init": False, "config": {}, "scale_input": True, "inner_dim": 48}
    made = trainer(folder / "spec", SpeculatorTrainer, rows=200, max_steps=150, optimizer=AdamW(lr=1e-2))
    made.model = SpeculatorModel(**{**model, "name_or_path": str(base)})
    made.train()
    hf = HFModel(name_or_path=str(base)).build(None).hf.eval()  # type: ignore[attr-defined]
    return hf, load_speculator(folder / "spec" / "huggingface")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_generation_with_drafts_equals_plain_greedy_generation(trained: tuple[Any, Any], count: int) -> None:
    hf, speculator = trained
    for seed in range(6):
        ids = torch.tensor(document(1000 + seed)[0][None, :6])
        plain = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        found, drafts = speculate(hf, speculator, ids, 20, count)
        assert found.tolist() == plain[0, ids.shape[1] :].tolist()
        assert 1 + drafts.tokens == len(found)
        assert drafts.accepted == sorted(drafts.accepted, reverse=True)


def test_a_trained_speculator_saves_passes(trained: tuple[Any, Any]) -> None:
    hf, speculator = trained
    ids = torch.tensor(document(2000)[0][None, :6])
    _, drafts = speculate(hf, speculator, ids, 30)
    assert drafts.tokens_per_step > 2
    with pytest.raises(RecipeError, match="4 drafts in a pass were asked for, and the speculator has 3 heads"):
        speculate(hf, speculator, ids, 30, 4)


def test_an_untrained_speculator_changes_nothing_either(trained: tuple[Any, Any]) -> None:
    hf, _ = trained
    config = SpeculatorModel(name_or_path="x", inner_dim=16).configuration_for(hf.config)
    ids = torch.tensor(np.array([[5, 16, 49]]))
    found, drafts = speculate(hf, MLPSpeculator(config), ids, 12)
    assert found.tolist() == hf.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert drafts.tokens_per_step < 2
    assert LLAMA["vocab_size"] == config["vocab_size"]
