"""A server of vLLM beside the trainer: what is on the wire, and that it must prove which weights it holds.

The double answers on a real socket, and computes: it loads what it is told to, and samples from that. The real vLLM is
in tests/in_vllm.
"""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from policies import grpo, replies
from ranks import on_two_ranks
from safetensors import safe_open
from test_turns import quiz
from toy import metrics
from transformers import AutoModelForCausalLM

from posttrain import LoRA, VllmServerSampler
from posttrain.blocks.rollouts.engines.weights import digests
from posttrain.errors import RecipeError, TrainingError


class Double:
    """`faults` say what is wrong with it."""

    def __init__(self, model: Path, *faults: str) -> None:
        self.faults, self.version, self.calls = set(faults), "default", Counter[str]()
        self.network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"double": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=lambda: self.http.serve_forever(0.02), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/update_weights":
            self.load(**body["update_info"])
        if path == "/finish_weight_update" and "old version" not in self.faults:
            self.version = body["weight_version"]
        if path == "/weight_checker":
            values = self.network.state_dict().items()
            return {"checksums": {name: str(float(value.double().sum())) for name, value in values}}
        return {}

    def load(self, folder: str, digests: dict[str, str]) -> None:
        found = {}
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as content:
                found |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        assert found.keys() == digests.keys()
        if "stale" in self.faults and self.calls["/update_weights"] == 2:
            del found["model.layers.1.mlp.down_proj.weight"]
        self.network.load_state_dict(found, strict="stale" not in self.faults)

    @torch.no_grad()
    def generate(self, body: dict[str, Any]) -> Any:
        asked = body["sampling_params"]
        self.asked.append(body)
        assert (asked["top_p"], asked["top_k"], asked["repetition_penalty"]) == (1.0, 0, 1.0)
        choices = []
        for index in range(asked["n"]):
            generator = torch.Generator().manual_seed(asked["seed"] + index)
            ids, content = list(body["token_ids"]), []
            for _ in range(asked["max_tokens"]):
                logits = self.network(input_ids=torch.tensor([ids])).logits[0, -1]
                heat = asked["temperature"] or 1.0
                scaled = (logits / heat).log_softmax(-1)
                token = int(torch.multinomial(scaled.exp(), 1, generator=generator))
                told = logits.log_softmax(-1) if "raw" in self.faults else scaled
                ids.append(token if asked["temperature"] else int(logits.argmax()))
                content.append({"token_id": ids[-1], "logprob": float(told[ids[-1]])})
                if ids[-1] in asked["stop_token_ids"]:
                    break
            said = ids[len(body["token_ids"]) :]
            choices.append({
                "index": index, "token_ids": said, "logprobs": {"content": content},
                "finish_reason": "stop" if said[-1] in asked["stop_token_ids"] else "length",
                "weight_versions": [{"version": self.version, "start": 0, "end": len(said)}],
            })  # fmt: skip
        return {"choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
        path = urlparse(self.path).path
        with self.double.lock:
            self.double.calls[path] += 1
            status = 404 if path in self.double.faults else 200
            data = json.dumps(self.double.answer(path, body) if status == 200 else {"detail": "Not Found"}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve(tiny_model: Path) -> Iterator[Any]:
    made: list[Double] = []

    def start(*faults: str) -> Double:
        made.append(Double(tiny_model, *faults))
        return made[-1]

    yield start
    for double in made:
        double.close()


def sampler(*servers: Double, **keys: Any) -> VllmServerSampler:
    urls = [server.url for server in servers]
    return VllmServerSampler(base_url=urls, **{"max_new_tokens": 6, "tolerance": 1e-4, **keys})


@pytest.mark.parametrize("keys", [{}, {"lora": LoRA(r=2)}, {"temperature": 0.7}])
def test_a_server_says_what_is_trained_and_is_sent_the_weights_of_every_step(
    tmp_path: Path, tiny_model: Path, serve: Any, keys: dict[str, Any]
) -> None:
    server = serve()
    heat = {"temperature": keys.pop("temperature")} if "temperature" in keys else {}
    left = tmp_path / "run" / "weights" / "0123abcd-7"
    left.mkdir(parents=True)  # as a kill may leave it
    run = grpo(tmp_path / "run", tiny_model, sampler=sampler(server, **heat), max_steps=2, group_size=2, **keys).train()
    assert server.calls["/update_weights"] == 3  # one for each step, and one for the evaluation at the end
    assert server.calls["/init_weight_transfer_engine"] == 1
    assert server.calls["/pause"] == server.calls["/resume"] == 3
    for line in metrics(tmp_path / "run")[:2]:
        assert line["sampler/gap"] < 1e-5
        assert line["sampler/probe"] < 1e-5
        assert line["policy/moved"] == 0.0
    with torch.no_grad():
        trained = run.model.module.base
        ids = torch.tensor([[5, 6, 7]])
        assert torch.allclose(server.network(input_ids=ids).logits, trained(input_ids=ids).logits, atol=1e-5)
    assert not list((tmp_path / "run" / "weights").iterdir())


def test_every_reply_has_random_numbers_of_its_own_and_a_key_gives_the_same(
    tmp_path: Path, tiny_model: Path, serve: Any
) -> None:
    for name in ("one", "two"):
        grpo(tmp_path / name, tiny_model, sampler=sampler(serve(), serve()), max_steps=1, group_size=2).train()
    assert replies(tmp_path / "one") == replies(tmp_path / "two")
    every = [tuple(ids) for *_, group in replies(tmp_path / "one") for ids in group]
    assert len(set(every)) == len(every)


def test_the_likeliest_reply_is_asked_for_once(tmp_path: Path, tiny_model: Path, serve: Any) -> None:
    server = serve()
    keys: dict[str, Any] = {"eval_temperature": 0.0, "eval_samples": 3, "eval_every": 1, "max_steps": 1}
    last = grpo(tmp_path / "run", tiny_model, sampler=sampler(server), **keys).train().last
    assert {body["sampling_params"]["n"] for body in server.asked if not body["sampling_params"]["temperature"]} == {1}
    assert "eval_reward" in last


def test_conversations_can_be_said_by_a_server(tmp_path: Path, tiny_model: Path, serve: Any) -> None:
    from transformers import GenerationConfig

    talkative = tmp_path / "model"
    shutil.copytree(tiny_model, talkative)
    GenerationConfig(eos_token_id=list(range(0, 256, 3))).save_pretrained(talkative)  # turns come to an end
    last = quiz(tmp_path / "run", talkative, sampler=sampler(serve()), group_size=2).train().last
    assert last["turns"] > 1.2
    assert last["sampler/gap"] < 1e-5
    assert last["policy/moved"] == 0.0


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (("stale",), r"was sent the weights of step 1, .*differ from the trainer's by .*it held other numbers in "
                     r"model.layers.1.mlp.down_proj.weight .1 such"),
        (("old version",), "has sampled with the weights default and not with .*An engine serves one run"),
        (("/start_weight_update",), "has no /start_weight_update; start it with\n  VLLM_SERVER_DEV_MODE=1 vllm serve"),
        (("/inference/v1/generate",), "has no /inference/v1/generate; start it with\n .*--enable-scale-out"),
        (("raw",), "differ .* before the temperature; start it with --logprobs-mode processed_logprobs"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_hold_the_weights_ends_the_run(
    tmp_path: Path, tiny_model: Path, serve: Any, faults: tuple[str, ...], said: str
) -> None:
    with pytest.raises(TrainingError, match=said):
        grpo(tmp_path / "run", tiny_model, sampler=sampler(serve(*faults), temperature=0.7), group_size=2).train()


def test_a_server_that_computes_something_else_is_told_from_one_with_other_weights(
    tmp_path: Path, tiny_model: Path, serve: Any
) -> None:
    server = serve()
    server.network.config.rms_norm_eps = 1.0
    for module in server.network.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.0
    with pytest.raises(TrainingError, match="all 21 tensors are as they were sent, so that it computes something else"):
        grpo(tmp_path / "run", tiny_model, sampler=sampler(server)).train()


def test_a_server_that_is_not_there_is_named_with_how_to_start_one(tmp_path: Path, tiny_model: Path) -> None:
    nobody = VllmServerSampler(base_url="http://127.0.0.1:9", max_new_tokens=4)
    with pytest.raises(TrainingError, match=r"127.0.0.1:9 does not answer .*start it with\n  VLLM_SERVER_DEV_MODE=1"):
        grpo(tmp_path / "run", tiny_model, sampler=nobody).train()


@pytest.mark.parametrize(
    ("keys", "said"), [({"temperature": 0.001}, "temperature"), ({"base_url": []}, "base_url")],
)  # fmt: skip
def test_what_an_engine_cannot_do_is_said_before_training(
    tmp_path: Path, tiny_model: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises((RecipeError, ValueError), match=said):
        block = VllmServerSampler(**{"base_url": "http://127.0.0.1:9", **keys})
        grpo(tmp_path / "run", tiny_model, sampler=block).train()


def test_digests_are_those_of_the_tensors_of_a_folder(tiny_model: Path) -> None:
    found = digests(tiny_model)
    assert len(found) == 21
    assert len(found["model.norm.weight"]) == 64


def train_on_ranks(folder: Path, model: str, url: str) -> None:
    from strategies import STRATEGIES

    for name in ("fsdp", "zero-3"):
        if name in STRATEGIES:
            block = VllmServerSampler(base_url=url, max_new_tokens=6, tolerance=1e-4)
            grpo(
                folder / name, Path(model), sampler=block, micro_batch_size=2, strategy=STRATEGIES[name], devices=2
            ).train()


@pytest.mark.slow
def test_sharded_weights_are_sent_whole(tmp_path: Path, tiny_model: Path, serve: Any) -> None:
    server = serve()
    on_two_ranks(tmp_path, "test_engines", f"train_on_ranks(folder, {str(tiny_model)!r}, {server.url!r})")
    done = [name for name in ("fsdp", "zero-3") if (tmp_path / "two" / name).exists()]
    assert "fsdp" in done
    for name in done:
        assert all(line["sampler/gap"] < 1e-5 for line in metrics(tmp_path / "two" / name) if "sampler/gap" in line)
