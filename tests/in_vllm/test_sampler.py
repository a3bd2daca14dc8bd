"""Reinforcement learning with a real vLLM on the CPU as the sampler: it holds the weights of every step, and proves it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cases import SHAPE, spread
from ranks import script
from test_synth import CHATML, save, serve
from test_vllm import SETTINGS

from posttrain import JSONL, AdamW, Constant, GRPOTrainer, HFModel, LoRA, PromptData, VllmSampler, VllmServerSampler
from posttrain.blocks.rollouts.engines import served
from posttrain.blocks.rollouts.engines.weights import digests, write
from posttrain.errors import TrainingError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("policy"), rewards=False)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    yield from serve(
        model, "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--weight-transfer-config",
        '{"backend": "posttrain"}', VLLM_SERVER_DEV_MODE="1",
    )  # fmt: skip


def vowels(prompt: str, reply: str, row: dict[str, Any]) -> float:
    return sum(map(reply.count, "aeiou")) / (1 + len(reply))


def train(folder: Path, model: Path, url: str, **keys: Any) -> Any:
    source = folder.parent / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(4)))
    sampling = {"max_new_tokens": 12, "tolerance": 1e-4, "temperature": 0.8, **keys.pop("sampling", {})}
    trainer = GRPOTrainer(
        model=keys.pop("policy", HFModel(name_or_path=str(model))),
        data=PromptData(sources=[source], cache_dir=folder.parent / "cache"),
        sampler=VllmServerSampler(base_url=url, **sampling) if url else VllmSampler(model_params=LOCAL, **sampling),
        rewards=[vowels], group_size=4, micro_batch_size=4,
        optimizer=AdamW(lr=1e-2), scheduler=Constant(), logger=[JSONL()], checkpoint=[], log_every=1,
        accelerator="cpu", output_dir=folder, **{"max_steps": 4, **keys},
    )  # fmt: skip
    return trainer.train()


LOCAL: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 26,
}  # fmt: skip


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_each_step_has_its_weights(found: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line in found:
        assert line["sampler/gap"] < 1e-4
        assert line["sampler/probe"] < 1e-4
        assert line["policy/moved"] == 0.0


def test_steps_are_sampled_by_an_engine_that_holds_the_weights_of_each(
    tmp_path: Path, model: Path, server: str
) -> None:
    run = train(tmp_path / "run", model, server)
    assert_each_step_has_its_weights(lines(tmp_path / "run"))
    version = httpx.get(f"{server}/weight_info").json()["weight_version"]
    assert version.endswith("-4")
    network, ids = run.model.module.base, [7, 8, 9, 10]
    assert abs(said(server, ids) - truth(network, ids)).max() > 1e-2  # it holds the weights before the last update


def test_adapters_are_merged_on_the_way(tmp_path: Path, model: Path, server: str) -> None:
    lora = HFModel(name_or_path=str(model), lora=LoRA(r=4, alpha=64))
    run = train(tmp_path / "run", model, server, policy=lora)
    assert max(line["sampler/gap"] for line in lines(tmp_path / "run")) < 1e-4
    assert [name for name, p in run.model.named_parameters() if p.requires_grad and "lora" not in name] == []


def said(server: str, ids: list[int]) -> torch.Tensor:
    asked = {"token_ids": ids, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0}}
    found = httpx.post(f"{server}/inference/v1/generate", json=asked).json()["prompt_logprobs"]
    return torch.tensor([one[str(token)]["logprob"] for one, token in zip(found[1:], ids[1:], strict=True)])


@torch.no_grad()
def truth(network: Any, ids: list[int]) -> torch.Tensor:
    logits = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_after_a_transfer_the_engine_says_what_the_new_weights_say(tmp_path: Path, model: Path, server: str) -> None:
    seen: list[float] = []
    transfer, ids = served.Served.transfer, [7, 8, 9, 10]

    def compared(self: Any, probe: list[int]) -> None:
        network = self.run.model.module.base
        before = said(server, ids)
        transfer(self, probe)
        seen.append(float((said(server, ids) - truth(network, ids)).abs().max()))
        seen.append(float((before - truth(network, ids)).abs().max()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.Served, "transfer", compared)
        train(tmp_path / "run", model, server)
    assert max(seen[0::2]) < 1e-4
    assert min(seen[3::2]) > 1e-2  # each step had moved them


def test_a_server_says_the_next_step_while_this_one_is_learned_from(tmp_path: Path, model: Path, server: str) -> None:
    train(tmp_path / "run", model, server, max_staleness=1, correction="token", max_gap=None)
    found = lines(tmp_path / "run")
    assert found[0]["sampler/gap"] < 1e-4
    assert min(line["sampler/gap"] for line in found[1:]) > 1e-3  # of the policy before the last update
    assert max(line.get("sampler/probe", 0.0) for line in found) < 1e-4
    assert [line["policy/moved"] for line in found] == [0.0] * 4


def test_a_transfer_that_leaves_a_tensor_out_of_step_ends_the_run(tmp_path: Path, model: Path, server: str) -> None:
    """What is sent is whole, and its digests are right; but a tensor of it is that of an earlier step."""
    from safetensors.torch import load_file, save_file

    old: dict[str, torch.Tensor] = {}
    name = "model.layers.1.mlp.down_proj.weight"

    def stale(run: Any, folder: Path) -> dict[str, str]:
        made = write(run, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        old.setdefault(name, tensors[name].clone())
        if run.step == 2:
            save_file({**tensors, name: old[name]}, file, metadata={"format": "pt"})
            return digests(folder)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "write", stale)
        with pytest.raises(TrainingError, match=r"was sent the weights of step 2, .* differ from the trainer's by"):
            train(tmp_path / "run", model, server)


def test_files_that_were_changed_on_the_way_are_named(tmp_path: Path, model: Path, server: str) -> None:
    from safetensors.torch import load_file, save_file

    def damaged(run: Any, folder: Path) -> dict[str, str]:
        made = write(run, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "write", damaged)
        with pytest.raises(TrainingError, match=r"the tensor model.norm.weight is not what the trainer wrote"):
            train(tmp_path / "run", model, server)
    train(tmp_path / "again", model, server, max_steps=1)  # and the server can still be used


def test_a_server_of_another_model_is_told_from_its_weights(tmp_path: Path, model: Path, server: str) -> None:
    from tokens import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**SHAPE, "pad_token_id": 0, "num_hidden_layers": 2, "vocab_size": 261, "max_position_embeddings": 1024}
    for change, said in (
        (
            {"hidden_size": 128, "head_dim": 16},
            "these weights do not fit the model that is served here .AssertionError",
        ),
        ({"num_hidden_layers": 1}, "the trainer sent nothing for model.layers.1.input_layernorm.weight .6 such"),
        ({"num_hidden_layers": 3}, "these weights do not fit the model .*layers.2"),
        ({"rms_norm_eps": 0.1}, "all 15 tensors are as they were sent, so that it computes something else"),
    ):
        other = tmp_path / next(iter(change))
        spread(LlamaForCausalLM(LlamaConfig(**{**config, **change}))).save_pretrained(other)
        byte_tokenizer(CHATML).save_pretrained(other)
        with pytest.raises(TrainingError, match=said):
            train(other / "run", other, server, max_steps=1)
    train(tmp_path / "again", model, server, max_steps=1)  # and the server can still be used


def test_an_engine_in_the_process_of_the_trainer_holds_the_weights_of_each_step(tmp_path: Path) -> None:
    """In a process of its own: an engine cannot be taken down cleanly. The head of its model is its embedding."""
    from tokens import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**SHAPE, "pad_token_id": 0, "num_hidden_layers": 2, "vocab_size": 261, "tie_word_embeddings": True}
    model = tmp_path / "tied"
    spread(LlamaForCausalLM(LlamaConfig(**config))).save_pretrained(model)
    byte_tokenizer(CHATML).save_pretrained(model)
    code = script(tmp_path, "test_sampler", f"train(folder, Path({str(model)!r}), '')")
    done = subprocess.run(
        [sys.executable, code, tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **SETTINGS},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = lines(tmp_path / "run")
    assert_each_step_has_its_weights(found)
    assert found[-1]["reward"] > found[0]["reward"]
