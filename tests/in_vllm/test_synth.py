"""posttrain.synth against a real vLLM on the CPU: a server for chats and one for rewards, and the engine in process."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cases import SHAPE, spread
from test_vllm import SETTINGS
from tokens import byte_tokenizer

from posttrain.synth import Generate, Judge, Pair, Pipeline, Reward, VllmSynth

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save(folder: Path, rewards: bool) -> Path:
    """Save a model with random weights and a tokenizer with a template."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        **{**SHAPE, "pad_token_id": 0, "num_hidden_layers": 2, "vocab_size": 261, "max_position_embeddings": 1024}
    )
    if rewards:
        torch.manual_seed(0)
        config.num_labels = 1
        LlamaForSequenceClassification(config).save_pretrained(folder)
    else:
        spread(LlamaForCausalLM(config)).save_pretrained(folder)
    byte_tokenizer(CHATML).save_pretrained(folder)
    return folder


def serve(model: Path, *more: str, **environment: str) -> Iterator[str]:
    """Start a server, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", str(1 << 26), "--host", "127.0.0.1", "--port", str(port), *more,
    ]  # fmt: skip
    with open(model / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **SETTINGS, **environment}, cwd=model
        )
        try:
            for _ in range(240):
                if process.poll() is not None:
                    break
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            assert process.poll() is None, (model / "log").read_text()[-3000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve(save(tmp_path_factory.mktemp("chats"), rewards=False))


SCORED = [[5, 6, 7], [9, 8, 7, 6], [100, 101]]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[float], Path]]:
    """A server, what transformers makes of SCORED, and the model."""
    from transformers import AutoModelForSequenceClassification

    model = save(tmp_path_factory.mktemp("rewards"), rewards=True)
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        scores = [network(torch.tensor([ids])).logits[0, 0].item() for ids in SCORED]
    for url in serve(model):
        yield url, scores, model


def said(name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say something to {name}."}]


def test_chats_with_samples_seeds_and_log_probabilities_come_in_order_and_are_paid_once(
    chats: str, tmp_path: Path
) -> None:
    client = VllmSynth(base_url=[chats], work_dir=tmp_path)
    for name in "abcdefgh":
        client.add_chat_to_batch_task(
            "t", model="tiny", messages=said(name), max_tokens=6, n=2, seed=3, temperature=1.0, logprobs=True,
            top_logprobs=2, ignore_eos=True,
        )  # fmt: skip
    found = client.execute_batch_task("t")
    assert [row["custom_id"] for row in found] == [f"t_{i}" for i in range(8)]
    for row in found:
        choices = row["response"]["body"]["choices"]
        assert len(choices) == 2
        assert all(len(choice["logprobs"]["content"]) == 6 for choice in choices)
        assert all(entry["logprob"] <= 0 for choice in choices for entry in choice["logprobs"]["content"])
    before = client.status("t").output_tokens
    assert before == 8 * 2 * 6
    assert client.execute_batch_task("t", max_requests=0) == found  # nothing may be sent, and nothing is


def test_the_same_seed_says_the_same(chats: str, tmp_path: Path) -> None:
    replies = []
    for run in range(2):
        client = VllmSynth(base_url=[chats], work_dir=tmp_path / str(run))
        client.add_chat_to_batch_task("t", model="tiny", messages=said("a"), max_tokens=8, seed=5, temperature=1.0)
        replies.append(client.extract_messages_from_responses(client.execute_batch_task("t")))
    assert replies[0] == replies[1]


def test_structured_output_is_what_was_asked_for(chats: str, tmp_path: Path) -> None:
    client = VllmSynth(base_url=[chats], work_dir=tmp_path)
    client.add_chat_to_batch_task("t", model="tiny", messages=said("a"), structured_outputs={"choice": ["yes", "no"]})
    (row,) = client.extract_messages_from_responses(client.execute_batch_task("t"))
    assert row["choices"][0]["content"] in ("yes", "no")


def test_what_the_server_refuses_is_a_failure_that_says_why(chats: str, tmp_path: Path) -> None:
    client = VllmSynth(base_url=[chats], work_dir=tmp_path)
    client.add_chat_to_batch_task("t", model="tiny", messages=said("a"), max_tokens=4)
    client.add_chat_to_batch_task("t", model="tiny", messages=said("x" * 4000), max_tokens=4)
    good, bad = client.execute_batch_task("t", on_error="return")
    assert good["error"] is None
    assert bad["response"] is None
    assert "1024" in bad["error"]["message"]


def test_rewards_are_raw_scores(rewards: tuple[str, list[float], Path], tmp_path: Path) -> None:
    url, scores, _ = rewards
    client = VllmSynth(base_url=[url], work_dir=tmp_path)
    for prompt in SCORED:
        client.add_request_to_batch_task("t", "/classify", {"model": "tiny", "input": prompt, "use_activation": False})
    found = [row["response"]["body"]["data"][0]["probs"][0] for row in client.execute_batch_task("t")]
    assert found == pytest.approx(scores, abs=1e-4)


def test_a_step_that_rewards_reads_what_transformers_computes(
    rewards: tuple[str, list[float], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [{"prompt": f"What is {i}?", "response": "x" * i} for i in range(1, 5)]
    client = VllmSynth(base_url=[rewards[0]], work_dir=tmp_path)
    found = [row["score"] for row in Pipeline([Reward(model="tiny")]).run(rows, client).rows()]
    network, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(rewards[2]).eval(),
        AutoTokenizer.from_pretrained(rewards[2]),
    )
    for row, score in zip(rows, found, strict=True):
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        assert score == pytest.approx(network(ids).logits[0, 0].item(), abs=1e-4)


def test_judges_get_their_form_and_the_probabilities_of_scores(chats: str, tmp_path: Path) -> None:
    """The model is random: in place of the schema, under which it writes white space for ever, stands a pattern."""
    form = {"regex": r'\{"rationale": "[a-z]{2}", "score": [1-3]\}'}
    body = {"response_format": {"type": "text"}, "structured_outputs": form, "max_tokens": 60, "temperature": 0}
    judge = Judge(rubric="Is it short?", model="tiny", scale=(1, 3), expected=True, body=body)
    steps = Generate(model="tiny", n=3, body={"max_tokens": 4, "temperature": 1.0, "ignore_eos": True}) | judge | Pair()
    report = steps.run([{"prompt": f"Say {i}."} for i in range(4)], VllmSynth(base_url=[chats], work_dir=tmp_path))
    assert report.stages[2].rows_out == report.stages[1].rows_out > 0
    scores = [json.loads(line)["score"] for line in (tmp_path / "pipeline" / "2-judge.jsonl").read_text().splitlines()]
    assert all(1 <= score <= 3 for score in scores)
    assert any(score != round(score) for score in scores)


def test_the_engine_in_process_answers_like_the_server(chats: str, tmp_path: Path) -> None:
    """In a process of its own: an engine cannot be taken down cleanly."""
    served = VllmSynth(base_url=[chats], work_dir=tmp_path / "served")
    model = save(tmp_path / "model", rewards=False)
    script = f"""
import json, os, sys
from posttrain.synth import Generate, Judge, Pair, Pipeline, Reward, VllmSynth
client = VllmSynth(
    model_params={{"model": {str(model)!r}, "dtype": "float32", "enforce_eager": True, "max_model_len": 256,
                  "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26}},
    work_dir={str(tmp_path / "engine")!r}, chunk_size=2,
)
for name in "abc":
    client.add_chat_to_batch_task("t", messages=[{{"role": "user", "content": f"Say something to {{name}}."}}],
                                  max_tokens=8, temperature=0)
found = client.execute_batch_task("t")
print("RESULT " + json.dumps(client.extract_messages_from_responses(found)), flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, env={**os.environ, **SETTINGS}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    for name in "abc":
        served.add_chat_to_batch_task("t", model="tiny", messages=said(name), max_tokens=8, temperature=0)
    theirs = served.extract_messages_from_responses(served.execute_batch_task("t"))
    ours: list[dict[str, Any]] = json.loads(lines[-1].removeprefix("RESULT "))
    assert [row["choices"][0]["content"] for row in ours] == [row["choices"][0]["content"] for row in theirs]
