"""Cortex on its three paths, key-pair tokens, and the vLLM engine in this process."""

import base64
import json
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from posttrain.errors import SynthError
from posttrain.synth import CortexSynth, VllmSynth
from posttrain.synth.clients.auth import KeyPairAuth
from posttrain.synth.ledger.keys import Scrubber

MESSAGES = [{"role": "user", "content": "q"}]


class Snowflake:
    """Answers as Snowflake's interfaces do, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[httpx.Request] = []
        self.statements: dict[str, str] = {}
        self.lose = 0
        self.stream = False
        self.url = ""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        path = request.url.path
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        if path == "/api/v2/cortex/v1/chat/completions":
            choice = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
            return httpx.Response(200, json={"choices": [choice], "usage": usage})
        if path == "/api/v2/cortex/inference:complete":
            if self.stream:
                events = [{"choices": [{"delta": {"type": "text", "content": part}}]} for part in ("a", "b")]
                events[-1]["usage"] = usage  # type: ignore[assignment]
                text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
                return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})
            return httpx.Response(
                200,
                json={
                    "choices": [{"message": {"content": "a", "content_list": []}}],
                    "usage": usage,
                    "finish_reason": "stop",
                },
            )
        if request.method == "POST":
            handle = self.statements.setdefault(request.url.params["requestId"], f"h{len(self.statements)}")
            if self.lose:
                self.lose -= 1
                raise httpx.ReadError("gone")
            return httpx.Response(202, json={"statementHandle": handle})
        cell = json.dumps({"choices": [{"messages": "a"}], "model": "m", "usage": usage})
        return httpx.Response(200, json={"data": [[cell]]})


class Served:
    """Snowflake behind a socket; a lost reply is a connection that closes without one."""

    def __init__(self, snowflake: Snowflake) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                url = f"http://{self.headers['host']}{self.path}"
                try:
                    found = snowflake(httpx.Request(self.command, url, headers=dict(self.headers), content=body))
                except httpx.ReadError:
                    self.close_connection = True
                    return
                self.send_response(found.status_code)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(found.content)

            do_GET = do_POST = answer

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def snowflake() -> Iterator[Snowflake]:
    made = Snowflake()
    served = Served(made)
    made.url = served.url
    yield made
    served.server.shutdown()
    served.server.server_close()


def cortex(snowflake: Snowflake, folder: Path, **more: Any) -> CortexSynth:
    return CortexSynth(account="org-acct", token="pat-0123456789", base_url=snowflake.url, work_dir=folder, **more)


@pytest.mark.parametrize("api", ["openai", "complete", "sql"])
def test_cortex_answers_in_one_shape_on_every_path(snowflake: Snowflake, tmp_path: Path, api: Any) -> None:
    made = cortex(snowflake, tmp_path, api=api)
    made.add_chat_to_batch_task("t", MESSAGES, model="llama3.1-8b", options={"temperature": 1, "top_p": 0.9})
    (response,) = made.execute_batch_task("t")
    assert response["response"]["body"]["choices"][0]["message"] == {"role": "assistant", "content": "a"}
    assert made.status("t").output_tokens == 2
    first = snowflake.asked[0]
    assert CortexSynth(account="org-acct").host == "https://org-acct.snowflakecomputing.com"
    assert first.headers["authorization"] == "Bearer pat-0123456789"
    body = json.loads(first.content)
    if api == "sql":
        assert json.loads(body["bindings"]["3"]["value"]) == {"temperature": 1, "top_p": 0.9}
        assert first.headers["user-agent"].startswith("posttrain")
    else:
        assert body["temperature"] == 1
        assert body.get("stream", api == "openai") is (api == "openai")


def test_a_stream_that_was_not_asked_for_is_put_together(snowflake: Snowflake, tmp_path: Path) -> None:
    snowflake.stream = True
    made = cortex(snowflake, tmp_path, api="complete")
    made.add_chat_to_batch_task("t", MESSAGES, model="m")
    assert made.execute_batch_task("t")[0]["response"]["body"]["choices"][0]["message"]["content"] == "ab"


def test_a_lost_reply_of_the_sql_interface_is_the_same_statement_again(
    snowflake: Snowflake, tmp_path: Path, hasty: None
) -> None:
    snowflake.lose = 2
    made = cortex(snowflake, tmp_path, api="sql")
    made.add_chat_to_batch_task("t", MESSAGES, model="m")
    made.execute_batch_task("t")
    assert len(snowflake.statements) == 1
    assert sum(request.method == "POST" for request in snowflake.asked) == 3


def test_what_cortex_cannot_honour_is_refused(snowflake: Snowflake, tmp_path: Path) -> None:
    made = CortexSynth(account="a", connection_params={"authenticator": "externalbrowser"}, work_dir=tmp_path)
    made.add_chat_to_batch_task("t", MESSAGES, model="m")
    with pytest.raises(SynthError, match="authenticator is not supported"):
        made.execute_batch_task("t")
    with pytest.raises(SynthError, match="no option 'seed'"):
        cortex(snowflake, tmp_path, api="sql").add_chat_to_batch_task("t", MESSAGES, model="m", seed=1)


def test_key_pair_tokens_are_signed_refreshed_and_made_again_when_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    key = rsa.generate_private_key(65537, 2048)
    file = tmp_path / "key.pem"
    form = serialization.PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    now = [1_000_000.0]
    auth = KeyPairAuth("org-acct.us-east", "me", file, None, Scrubber(), clock=lambda: now[0])

    def token(refused: bool = False) -> str:
        flow = auth.sync_auth_flow(httpx.Request("POST", "https://x"))
        request = next(flow)
        if refused:
            now[0] += 1
            request = flow.send(httpx.Response(401, request=request))
        assert request.headers["X-Snowflake-Authorization-Token-Type"] == "KEYPAIR_JWT"
        return request.headers["authorization"].removeprefix("Bearer ")

    first = token()
    head, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in first.split("."))
    key.public_key().verify(signature, first.rpartition(".")[0].encode(), padding.PKCS1v15(), hashes.SHA256())
    assert json.loads(head) == {"alg": "RS256", "typ": "JWT"}
    said = json.loads(claims)
    assert said["sub"] == "ORG-ACCT.ME"
    assert said["iss"].startswith("ORG-ACCT.ME.SHA256:")
    assert said["exp"] - said["iat"] <= 3600
    now[0] += 1000
    assert token() == first
    now[0] += 2300  # five minutes before its end
    second = token()
    assert second != first
    assert token(refused=True) not in (first, second)


class FakeParams:
    """Stands for `vllm.SamplingParams`, a msgspec struct."""

    __struct_fields__ = ("temperature", "max_tokens", "n", "seed", "logprobs", "structured_outputs")

    def __init__(self, temperature: float = 1.0, max_tokens: int | None = 16, n: int = 1, seed: int | None = None,
                 logprobs: int | None = None, structured_outputs: Any = None) -> None:  # fmt: skip
        self.temperature, self.max_tokens, self.n, self.seed = temperature, max_tokens, n, seed
        self.logprobs, self.structured_outputs = logprobs, structured_outputs


class FakeLLM:
    """Stands for `vllm.LLM`: answers chats, refuses those that are too long, like the engine: the whole call."""

    def __init__(self, model: str) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []
        self.params: list[FakeParams] = []

    def chat(self, messages: list[Any], sampling_params: list[FakeParams], use_tqdm: bool, **more: Any) -> list[Any]:
        texts = [chat[-1]["content"] for chat in messages]
        if any("long" in text for text in texts):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        self.calls.append((len(messages), more))
        self.params += sampling_params
        return [self._output(text, said) for text, said in zip(texts, sampling_params, strict=True)]

    def _output(self, text: str, said: FakeParams) -> Any:
        logprobs = [{7: types.SimpleNamespace(decoded_token="x", logprob=-0.5)}] if said.logprobs is not None else None
        choices = [
            types.SimpleNamespace(
                index=i, text=f"re: {text}", token_ids=[7], finish_reason="stop", stop_reason=None, logprobs=logprobs
            )
            for i in range(said.n)
        ]
        return types.SimpleNamespace(request_id="1", prompt_token_ids=[1, 2, 3], outputs=choices)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module, below = types.ModuleType("vllm"), types.ModuleType("vllm.sampling_params")
    module.LLM, module.SamplingParams = FakeLLM, FakeParams  # type: ignore[attr-defined]
    below.StructuredOutputsParams = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", below)
    return module


def test_the_engine_answers_in_chunks_and_a_refused_prompt_costs_only_itself(vllm: Any, tmp_path: Path) -> None:
    made = VllmSynth(
        model_params={"model": "m"}, sampling_params=vllm.SamplingParams(temperature=0), chunk_size=4, work_dir=tmp_path
    )
    for i in range(10):
        made.add_chat_to_batch_task("t", [{"role": "user", "content": "long" if i == 5 else f"q{i}"}], n=2)
    responses = made.execute_batch_task("t", on_error="return")
    assert [len(r["choices"]) for r in made.extract_messages_from_responses(responses)] == [2] * 5 + [0] + [2] * 4
    assert responses[5]["error"]["code"] == "refused_by_engine"
    assert responses[9]["response"]["body"]["choices"][1]["message"]["content"] == "re: q9"
    assert responses[0]["response"]["body"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert max(count for count, _ in made.llm.calls) == 4
    assert {p.temperature for p in made.llm.params} == {0}
    assert {p.max_tokens for p in made.llm.params} == {None}
    before = len(made.llm.calls)
    made.execute_batch_task("t", on_error="return")
    assert len(made.llm.calls) == before


def test_the_engine_gets_what_a_chat_body_means(vllm: Any, tmp_path: Path) -> None:
    made = VllmSynth(model_params={"model": "m"}, work_dir=tmp_path)
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    made.add_chat_to_batch_task(
        "t", MESSAGES, max_completion_tokens=9, logprobs=True, top_logprobs=1, response_format=schema
    )
    made.add_chat_to_batch_task("t", MESSAGES, chat_template_kwargs={"enable_thinking": False}, seed=3)
    first, second = made.execute_batch_task("t")
    assert made.llm.params[0].max_tokens == 9
    assert made.llm.params[0].structured_outputs == {"json": {"type": "object"}}
    content = first["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert content == [{"token": "x", "logprob": -0.5, "top_logprobs": [{"token": "x", "logprob": -0.5}]}]
    assert made.llm.calls[1][1] == {"chat_template_kwargs": {"enable_thinking": False}}
    assert made.llm.params[1].seed == 3
    assert second["error"] is None


def test_vllm_wants_either_servers_or_an_engine(tmp_path: Path) -> None:
    made = VllmSynth(work_dir=tmp_path)
    made.add_chat_to_batch_task("t", MESSAGES, model="m")
    with pytest.raises(SynthError, match="either base_url"):
        made.execute_batch_task("t")
