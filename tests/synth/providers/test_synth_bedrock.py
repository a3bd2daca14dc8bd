"""Bedrock's Converse, against a server on a real socket that speaks it and checks the signatures."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from synth_server import Handler, Server, add, reset, texts

from posttrain.errors import SynthError
from posttrain.synth import BedrockSynth, Converse, Generate, Pipeline, Price, TaskStopped
from posttrain.synth.clients.sigv4 import SigV4Auth
from posttrain.synth.ledger.keys import Scrubber, as_secret
from posttrain.synth.sending.wires.bedrock import from_wire, to_wire

WANTED = [f"re: q{i}" for i in range(7)]
MODEL = "us.anthropic.claude-v1:0"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
NOON = 1_440_938_160.0
"""2015-08-30 12:36 UTC, the time of AWS' test suite."""


@pytest.fixture(autouse=True)
def no_keys(hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_BEARER_TOKEN_BEDROCK", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


# -- signatures -------------------------------------------------------------------------------

VECTORS = {
    # AWS' signature test suite (aws-sig-v4-test-suite)
    "get-vanilla": ("GET", "https://example.amazonaws.com/", {}, b"", None, "service",
                    "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
    "post-vanilla": ("POST", "https://example.amazonaws.com/", {}, b"", None, "service",
                     "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
    "get-vanilla-query-order-key-case": (
        "GET", "https://example.amazonaws.com/?Param2=value2&Param1=value1", {}, b"", None, "service",
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
    "post-x-www-form-urlencoded": (
        "POST", "https://example.amazonaws.com/", {"content-type": "application/x-www-form-urlencoded"},
        b"Param1=value1", None, "service", "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a"),
    # made by botocore 1.44.8
    "a model with a colon": (
        "POST", "https://bedrock-runtime.us-east-1.amazonaws.com/model/anthropic.claude-v1%3A0/converse",
        {"content-type": "application/json"}, b'{"messages": []}', None, "bedrock",
        "ce41c42c581259323a1417d7dad200ee1505c5fea84cca2d3d8d4d04457e79cc"),
    "a session token": (
        "POST", "https://bedrock-runtime.us-east-1.amazonaws.com/model/anthropic.claude-v1%3A0/converse",
        {"content-type": "application/json"}, b'{"messages": []}', "TOKEN/abc==", "bedrock",
        "0302074ddc871b6cc521ffa7e0691548aeb0d3df58540b5890faee6f78fe310a"),
}  # fmt: skip


def signed(method: str, url: str, headers: Any, body: bytes, token: str | None, service: str) -> httpx.Request:
    keys = as_secret("AKIDEXAMPLE"), as_secret(SECRET), as_secret(token)
    assert keys[0] and keys[1]
    auth = SigV4Auth(keys[0], keys[1], keys[2], "us-east-1", service, Scrubber(), lambda: NOON)
    given = httpx.Request(method, url, headers=headers, content=body or None)
    return next(auth.auth_flow(given))


@pytest.mark.parametrize("name", VECTORS)
def test_a_request_is_signed_as_aws_says(name: str) -> None:
    *given, wanted = VECTORS[name]
    request = signed(*given)  # type: ignore[arg-type]
    assert request.headers["authorization"].endswith(f"Signature={wanted}")
    assert "Credential=AKIDEXAMPLE/20150830/us-east-1/" in request.headers["authorization"]


# -- the wire -----------------------------------------------------------------------------------


def message(request: dict[str, Any]) -> dict[str, Any]:
    """What Converse answers; it refuses what it refuses."""
    assert not request.keys() & {"model", "max_tokens", "temperature"}
    roles = [m["role"] for m in request["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
    assert all(len(block) == 1 for m in request["messages"] for block in m["content"])
    text = request["messages"][-1]["content"][-1].get("text", "")
    content = [{"reasoningContent": {"reasoningText": {"text": "hm", "signature": "SIG"}}}, {"text": f"re: {text}"}]
    usage = {
        "inputTokens": 3,
        "outputTokens": 5,
        "cacheReadInputTokens": 4,
        "cacheWriteInputTokens": 3,
        "totalTokens": 15,
    }
    said = {"role": "assistant", "content": content}
    return {"output": {"message": said}, "stopReason": "end_turn", "usage": usage, "metrics": {"latencyMs": 1}}


class Bedrock(Server):
    def __init__(self) -> None:
        super().__init__()
        self.says = message
        self.refuses: list[tuple[int, str, str]] = []
        self.bearer = ""
        self.http.RequestHandlerClass = type("B", (Speaks,), {"server_": self})  # type: ignore[assignment]


class Speaks(Handler):
    server_: Bedrock

    def answer(self, key: str, path: str) -> None:
        server = self.server_
        assert unquote(self.path) == f"/model/{MODEL}/converse"
        assert ":" not in self.path
        given = self.headers["authorization"]
        if server.bearer:
            assert given == f"Bearer {server.bearer}"
        else:
            kept = {n: self.headers[n] for n in ("content-type", "host")}
            keys = as_secret("AKIDEXAMPLE"), as_secret(SECRET)
            request = httpx.Request(
                "POST", f"{server.url.removesuffix('/v1')}{self.path}", headers=kept, content=self.content
            )
            import calendar
            import time

            at = calendar.timegm(time.strptime(self.headers["x-amz-date"], "%Y%m%dT%H%M%SZ"))
            auth = SigV4Auth(keys[0], keys[1], None, "eu-west-1", "bedrock", Scrubber(), lambda: at)  # type: ignore[arg-type]
            if next(auth.auth_flow(request)).headers["authorization"] != given:
                said = {"message": "The security token included in the request is invalid."}
                return self.json(said, 403, x_amzn_errortype="UnrecognizedClientException:http://internal")
        with server.lock:
            if server.refuses:
                status, kind, text = server.refuses.pop(0)
                return self.json({"message": text}, status, x_amzn_errortype=f"{kind}:http://internal")
            body = json.loads(self.content)
            server.bodies.append((path, body))
            server.paid[body["messages"][-1]["content"][-1].get("text", "")] += 1
            return self.json(server.says(body), x_amzn_requestid="req-1")


@pytest.fixture
def bedrock() -> Any:
    made = Bedrock()
    yield made
    made.close()


def client(server: Bedrock, folder: Path, **more: Any) -> BedrockSynth:
    given = {"region": "eu-west-1", "patience": 5, **more}
    if "api_key" not in given:
        given |= {"access_key": "AKIDEXAMPLE", "secret_key": given.get("secret_key", SECRET)}
    return BedrockSynth(base_url=server.url.removesuffix("/v1"), work_dir=folder, **given)


def asking(made: BedrockSynth, count: int = 7, **body: Any) -> BedrockSynth:
    for i in range(count):
        made.add_chat_to_batch_task("t", [{"role": "user", "content": f"q{i}"}], MODEL, **body)
    return made


@pytest.mark.parametrize("bearer", ["", "bedrock-api-key-0123"])
def test_results_are_in_order_paid_once_and_priced(bedrock: Bedrock, tmp_path: Path, bearer: str) -> None:
    bedrock.bearer = bearer
    more = {"api_key": bearer} if bearer else {}
    made = asking(client(bedrock, tmp_path, prices={MODEL: Price(input=2, output=4, cached=1)}, **more), max_tokens=9)
    for _ in range(2):
        responses = made.execute_batch_task("t")
        assert texts(responses) == WANTED
    assert set(bedrock.paid.values()) == {1}
    assert responses[0]["response"]["body"]["choices"][0]["message"]["reasoning_content"] == "hm"
    assert responses[0]["response"]["request_id"] == "req-1"
    assert made.status("t").cost == pytest.approx(7 * (6 * 2 + 4 * 1 + 5 * 4) / 1e6)
    assert bedrock.bodies[0][1]["inferenceConfig"] == {"maxTokens": 9}


def test_a_chat_is_put_into_converses_words_and_back() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    thoughts = [{"type": "thinking", "thinking": "hm", "signature": "SIG"}, {"type": "redacted_thinking", "data": "AA"}]
    made = to_wire({
        "model": "m", "max_tokens": 5, "stop": ["END"], "temperature": 0, "additionalModelRequestFields": {"top_k": 3},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
        "tool_choice": "required",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [
                {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}},
            ]},
            {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "d"}], "thinking_blocks": thoughts},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            {"role": "tool", "tool_call_id": "d", "content": ""},
        ],
    })  # fmt: skip
    assert made == {
        "inferenceConfig": {"maxTokens": 5, "stopSequences": ["END"], "temperature": 0},
        "additionalModelRequestFields": {"top_k": 3}, "system": [{"text": "be kind"}],
        "toolConfig": {
            "tools": [{"toolSpec": {"name": "f", "description": "d", "inputSchema": {"json": schema}}}],
            "toolChoice": {"any": {}},
        },
        "messages": [
            {"role": "user", "content": [{"text": "see"}, {"image": {"format": "jpeg", "source": {"bytes": "AAAA"}}}]},
            {"role": "assistant", "content": [
                {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "SIG"}}},
                {"reasoningContent": {"redactedContent": "AA"}},
                {"toolUse": {"toolUseId": "c", "name": "f", "input": {"x": 1}}},
                {"toolUse": {"toolUseId": "d", "name": "f", "input": {"x": 1}}},
            ]},
            {"role": "user", "content": [
                {"toolResult": {"toolUseId": "c", "content": [{"text": "1"}]}},
                {"toolResult": {"toolUseId": "d", "content": [{"text": "(nothing)"}]}},
            ]},
        ],
    }  # fmt: skip
    content = [*made["messages"][1]["content"][:3]]
    reply = from_wire({"output": {"message": {"role": "assistant", "content": content}}, "stopReason": "tool_use"}, "m")
    assert reply["choices"][0] == {
        "index": 0, "finish_reason": "tool_calls",
        "message": {
            "role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call],
            "thinking_blocks": thoughts,
        },
    }  # fmt: skip


def test_tools_and_forms_work_through_to_rows(bedrock: Bedrock, tmp_path: Path) -> None:
    def double(x: int) -> int:
        """Double.

        Args:
            x: what.
        """
        return 2 * x

    def says(request: dict[str, Any]) -> dict[str, Any]:
        made, last = message(request), request["messages"][-1]["content"][-1]
        if "toolResult" in last:
            assert request["messages"][1]["content"][0]["reasoningContent"]["reasoningText"]["signature"] == "SIG"
            return made
        name = request["toolConfig"]["tools"][-1]["toolSpec"]["name"]
        given = {"x": 4} if name == "double" else {"year": 1999}
        made["output"]["message"]["content"][1:] = [{"toolUse": {"toolUseId": "u", "name": name, "input": given}}]
        return {**made, "stopReason": "tool_use"}

    bedrock.says = says
    step = Converse(model=MODEL, tools=[double])
    (row,) = Pipeline([step]).run([{"prompt": "q"}], client(bedrock, tmp_path), "p").rows()
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["content"] == "8"
    assert not any("thinking_blocks" in m for m in row["messages"])
    schema = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}
    (row,) = (
        Pipeline([Generate(model=MODEL, schema=schema)]).run([{"prompt": "q"}], client(bedrock, tmp_path), "f").rows()
    )
    assert row["year"] == 1999
    assert bedrock.bodies[-1][1]["toolConfig"]["toolChoice"] == {"tool": {"name": "reply"}}


def test_throttling_waits_and_what_is_ill_is_tried_again(bedrock: Bedrock, tmp_path: Path) -> None:
    bedrock.refuses = [
        (429, "ThrottlingException", "slow down"), (424, "ModelErrorException", "oops"),
        (503, "ServiceUnavailableException", "later"), (408, "ModelTimeoutException", "late"),
    ]  # fmt: skip
    bedrock.faults["POST /model/us.anthropic.claude-v1%3A0/converse"] = [reset]
    made = asking(client(bedrock, tmp_path))
    assert texts(made.execute_batch_task("t")) == WANTED
    bedrock.refuses = [(400, "ValidationException", "too long")]
    made = add(client(bedrock, tmp_path), 0)
    made.add_chat_to_batch_task("u", [{"role": "user", "content": "long"}], MODEL)
    (response,) = made.execute_batch_task("u", on_error="return")
    assert (response["error"]["code"], response["error"]["message"]) == ("ValidationException", "too long")


def test_a_wrong_key_stops_the_task_and_is_never_shown(bedrock: Bedrock, tmp_path: Path) -> None:
    made = asking(client(bedrock, tmp_path, secret_key="wrong-secret-key"), 2)
    with pytest.raises(TaskStopped, match="UnrecognizedClientException: The security token") as caught:
        made.execute_batch_task("t")
    assert "wrong-secret" not in str(caught.value)


def test_what_converse_cannot_do_is_said_before_anything_is_sent(
    bedrock: Bedrock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client(bedrock, tmp_path)
    with pytest.raises(SynthError, match="no 'seed'; what a model has of its own belongs into additionalModelRequest"):
        asking(made, seed=1)
    for url, what in (("https://a/b.png", "an address"), ("data:image/tiff;base64,AA", "image/tiff")):
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(SynthError, match=f"Bedrock takes images as data of .*, not {what}"):
            made.add_chat_to_batch_task("t", [{"role": "user", "content": [part]}], MODEL)
    with pytest.raises(SynthError, match="Bedrock's batches read from and write to S3"):
        asking(client(bedrock, tmp_path, mode="batch"), 1).execute_batch_task("t")
    with pytest.raises(SynthError, match="needs region="):
        asking(BedrockSynth(work_dir=tmp_path / "b"), 1)
    assert not bedrock.paid
