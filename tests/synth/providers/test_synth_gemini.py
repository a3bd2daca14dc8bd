"""Gemini's generateContent and batches, against a server on a real socket that speaks them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from synth_server import Handler, Server, add, reset, texts

from posttrain.errors import SynthError
from posttrain.synth import Converse, GeminiSynth, Generate, Judge, Pipeline, Price, TaskStopped
from posttrain.synth.sending.wires.gemini import from_wire, to_wire

WANTED = [f"re: q{i}" for i in range(7)]
PARTS = ("text", "inlineData", "fileData", "functionCall", "functionResponse")

pytestmark = pytest.mark.usefixtures("hasty")


def candidate(request: dict[str, Any]) -> dict[str, Any]:
    """What Gemini answers; it refuses what it refuses."""
    assert not request.keys() & {"messages", "model", "max_tokens"}
    assert all(turn["role"] in ("user", "model") for turn in request["contents"])
    assert all(sum(name in p for name in PARTS) == 1 for turn in request["contents"] for p in turn["parts"])
    text = request["contents"][-1]["parts"][-1].get("text", "")
    parts = [{"text": "hm", "thought": True}, {"text": "re: "}, {"text": text}]
    usage = {
        "promptTokenCount": 10, "cachedContentTokenCount": 4, "candidatesTokenCount": 2, "thoughtsTokenCount": 3,
        "totalTokenCount": 15,
    }  # fmt: skip
    return {
        "candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP", "index": 0}],
        "usageMetadata": usage, "modelVersion": "m-001", "responseId": "r",
    }  # fmt: skip


def failed(status: int, name: str, message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "status": name, **more}}


class Gemini(Server):
    def __init__(self) -> None:
        super().__init__()
        self.says = candidate
        self.refuses: list[tuple[int, dict[str, Any]]] = []
        self.ends: dict[str, Any] = {}
        """Text of a request -> its error in a batch."""
        self.state = "BATCH_STATE_SUCCEEDED"
        self.http.RequestHandlerClass = type("G", (Speaks,), {"server_": self})  # type: ignore[assignment]
        self.root = self.url.removesuffix("/v1")

    def begun(self, given: dict[str, Any]) -> dict[str, Any]:
        name = f"batches/b{len(self.batches)}"
        about = {
            "state": "BATCH_STATE_PENDING",
            "displayName": given["displayName"],
            "file": given["inputConfig"]["fileName"],
        }
        self.batches[name] = {"name": name, "metadata": about}
        return self.batches[name]

    def results(self, file: str) -> bytes:
        lines = []
        for text in self.contents[file].splitlines():
            line = json.loads(text)
            said = line["request"]["contents"][-1]["parts"][-1]["text"]
            if said in self.ends:
                lines.append({"key": line["key"], "error": self.ends[said]})
                continue
            self.paid[said] += 1
            lines.append({"key": line["key"], "response": self.says(line["request"])})
        return b"".join(json.dumps(line).encode() + b"\n" for line in reversed(lines))


class Speaks(Handler):
    server_: Gemini

    def answer(self, key: str, path: str) -> None:
        server = self.server_
        if self.headers["x-goog-api-key"] != "AIza-0123456789":
            said = "API key not valid. Please pass a valid API key."
            return self.json(failed(400, "INVALID_ARGUMENT", said), 400)
        with server.lock:
            if server.refuses:
                status, body = server.refuses.pop(0)
                return self.json(body, status)
            if path.endswith(":generateContent"):
                body = json.loads(self.content)
                server.bodies.append((path, body))
                server.paid[body["contents"][-1]["parts"][-1].get("text", "")] += 1
                return self.json(server.says(body))
            if path == "/upload/v1beta/files":
                assert self.headers["x-goog-upload-command"] == "start"
                assert json.loads(self.content)["file"]["displayName"].startswith("posttrain-")
                where = f"{server.root}/sent?upload_id={self.headers['x-goog-upload-header-content-length']}"
                return self.send(200, b"{}", x_goog_upload_url=where)
            if path == "/sent":
                assert self.headers["x-goog-upload-command"] == "upload, finalize"
                assert len(self.content) == int(self.query["upload_id"])
                name = f"files/f{len(server.contents)}"
                server.contents[name] = self.content
                return self.json({"file": {"name": name, "state": "ACTIVE"}})
            if path.endswith(":batchGenerateContent"):
                assert path.startswith("/v1beta/models/m:")
                return self.json(server.begun(json.loads(self.content)["batch"]))
            if path == "/v1beta/batches":
                found = list(server.batches.values())[::-1]
                at = int(self.query.get("pageToken", 0))
                more = {"nextPageToken": str(at + 1)} if at + 1 < len(found) else {}
                return self.json({"operations": found[at : at + 1], **more})
            if path.startswith("/download/v1beta/files/"):
                assert self.query["alt"] == "media"
                return self.send(200, server.results(path.removeprefix("/download/v1beta/").removesuffix(":download")))
            name = path.removeprefix("/v1beta/").removesuffix(":cancel")
            about = server.batches[name]["metadata"]
            about["state"] = "BATCH_STATE_CANCELLED" if path.endswith(":cancel") else (
                server.state if about["state"] == "BATCH_STATE_PENDING" else about["state"]
            )  # fmt: skip
            if about["state"] == "BATCH_STATE_SUCCEEDED":
                about["output"] = {"responsesFile": about["file"]}
            return self.json(server.batches[name])


@pytest.fixture
def gemini() -> Any:
    made = Gemini()
    yield made
    made.close()


def client(server: Gemini, folder: Path, **more: Any) -> GeminiSynth:
    given = {"api_key": "AIza-0123456789", "poll_every": 0.01, "reconcile_after": 0.01, "patience": 5, **more}
    return GeminiSynth(base_url=f"{server.root}/v1beta", work_dir=folder, **given)


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_results_are_in_order_and_paid_once_in_both_modes(gemini: Gemini, tmp_path: Path, mode: str) -> None:
    made = add(client(gemini, tmp_path, mode=mode, prices={"m": Price(input=2, output=4, cached=1)}), max_tokens=9)
    for _ in range(2):
        responses = made.execute_batch_task("t")
        assert texts(responses) == WANTED
    assert set(gemini.paid.values()) == {1}
    body = responses[0]["response"]["body"]
    assert body["choices"][0]["message"]["reasoning_content"] == "hm"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert made.status("t").cost == pytest.approx(7 * (6 * 2 + 4 * 1 + 5 * 4) / (2 if mode == "batch" else 1) / 1e6)
    other = add(client(gemini, tmp_path, mode="online" if mode == "batch" else "batch"), max_tokens=9)
    assert texts(other.execute_batch_task("t")) == WANTED  # one mode takes over from the other
    assert set(gemini.paid.values()) == {1}


def test_a_chat_is_put_into_geminis_words_and_back() -> None:
    signed = {"extra_content": {"google": {"thought_signature": "SIG"}}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}, **signed}
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    made = to_wire({
        "model": "m", "max_tokens": 5, "stop": "END", "top_k": 3, "temperature": 0, "thinkingConfig": {"thinkingBudget": 0},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "safetySettings": [],
        "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}},
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [
                {"type": "text", "text": "see"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://a/b.jpg"}},
            ]},
            {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "d", "function": {"name": "g"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            {"role": "tool", "tool_call_id": "d", "content": "2"},
        ],
    })  # fmt: skip
    assert made == {
        "generationConfig": {
            "maxOutputTokens": 5, "stopSequences": ["END"], "topK": 3, "temperature": 0,
            "thinkingConfig": {"thinkingBudget": 0}, "responseMimeType": "application/json", "responseJsonSchema": schema,
        },
        "tools": [{"functionDeclarations": [{"name": "f", "description": "d", "parametersJsonSchema": schema}]}],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}}, "safetySettings": [],
        "systemInstruction": {"parts": [{"text": "be kind"}]},
        "contents": [
            {"role": "user", "parts": [
                {"text": "see"}, {"inlineData": {"mimeType": "image/png", "data": "AAAA"}},
                {"fileData": {"fileUri": "https://a/b.jpg", "mimeType": "image/jpeg"}},
            ]},
            {"role": "model", "parts": [
                {"functionCall": {"name": "f", "args": {"x": 1}}, "thoughtSignature": "SIG"},
                {"functionCall": {"name": "g", "args": {}}, "thoughtSignature": "SIG"},
            ]},
            {"role": "user", "parts": [
                {"functionResponse": {"name": "f", "response": {"result": "1"}}},
                {"functionResponse": {"name": "g", "response": {"result": "2"}}},
            ]},
        ],
    }  # fmt: skip
    part = {"functionCall": {"name": "f", "args": {"x": 1}}, "thoughtSignature": "SIG"}
    reply = from_wire({"candidates": [{"content": {"parts": [part]}, "finishReason": "STOP"}]})
    assert reply["choices"][0] == {
        "index": 0, "finish_reason": "tool_calls",
        "message": {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "call_0"}]},
    }  # fmt: skip


def test_tools_are_called_and_what_they_say_goes_back_with_the_signature(gemini: Gemini, tmp_path: Path) -> None:
    def double(x: int) -> int:
        """Double.

        Args:
            x: what.
        """
        return 2 * x

    def says(request: dict[str, Any]) -> dict[str, Any]:
        made, last = candidate(request), request["contents"][-1]["parts"][-1]
        if "functionResponse" in last:
            assert request["contents"][1]["parts"][0]["thoughtSignature"] == "SIG"
            assert last["functionResponse"] == {"name": "double", "response": {"result": "8"}}
            return made
        made["candidates"][0]["content"]["parts"] = [
            {"functionCall": {"name": "double", "args": {"x": 4}}, "thoughtSignature": "SIG"}
        ]
        return made

    gemini.says = says
    step = Converse(model="m", tools=[double])
    (row,) = Pipeline([step]).run([{"prompt": "q"}], client(gemini, tmp_path, mode="online"), "p").rows()
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["content"] == "8"


def test_forms_and_log_probabilities_are_asked_for_and_read(gemini: Gemini, tmp_path: Path) -> None:
    def says(request: dict[str, Any]) -> dict[str, Any]:
        made, config = candidate(request), request["generationConfig"]
        assert config["responseMimeType"] == "application/json"
        assert (config["responseLogprobs"], config["logprobs"]) == (True, 10)
        text = '{"rationale": "r", "score": 4}'
        made["candidates"][0]["content"]["parts"] = [{"text": text}]
        tokens = [
            {"token": text[:-2], "logProbability": 0.0},
            {"token": "4", "logProbability": -0.7},
            {"token": "}", "logProbability": 0},
        ]
        if text[-2] == "4":
            tokens[0]["token"] = text[:-2]
        top = [
            {"candidates": []},
            {"candidates": [{"token": "4", "logProbability": -0.6931}, {"token": "2", "logProbability": -0.6931}]},
            {},
        ]
        made["candidates"][0]["logprobsResult"] = {"chosenCandidates": tokens, "topCandidates": top}
        return made

    gemini.says = says
    judge = Judge(rubric="good", model="m", expected=True)
    rows = [{"prompt": "q", "response": "a"}]
    (row,) = Pipeline([judge]).run(rows, client(gemini, tmp_path, mode="online"), "p").rows()
    assert row["score"] == pytest.approx(3.0)
    schema = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}
    gemini.says = lambda request: {
        "candidates": [{"content": {"parts": [{"text": '{"score": 3}'}]}, "finishReason": "STOP"}]
    }
    (row,) = (
        Pipeline([Generate(model="m", schema=schema)])
        .run([{"prompt": "q"}], client(gemini, tmp_path, mode="online"), "f")
        .rows()
    )
    assert row["score"] == 3


def test_what_was_blocked_is_no_answer(gemini: Gemini, tmp_path: Path) -> None:
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 3}}
    cut = {"candidates": [{"finishReason": "PROHIBITED_CONTENT", "index": 0}]}
    gemini.says = lambda request: blocked if "q0" in json.dumps(request) else cut
    step, rows = Generate(model="m"), [{"prompt": "q0"}, {"prompt": "q1"}]
    report = Pipeline([step]).run(rows, client(gemini, tmp_path, mode="online"), "p")
    assert report.stages[1].dropped == {"the model refused": 1, "the reply holds no text: content_filter": 1}


def test_google_says_how_long_to_wait_and_that_is_held(gemini: Gemini, tmp_path: Path) -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.2s"}
    gemini.refuses = [
        (429, failed(429, "RESOURCE_EXHAUSTED", "quota", details=[info])),
        (503, failed(503, "UNAVAILABLE", "busy")),
    ]
    assert texts(add(client(gemini, tmp_path, mode="online"), 2).execute_batch_task("t")) == WANTED[:2]
    long = {**info, "retryDelay": "3600s"}
    gemini.refuses = [(429, failed(429, "RESOURCE_EXHAUSTED", "quota", details=[long]))]
    with pytest.raises(TaskStopped, match=r"RESOURCE_EXHAUSTED: quota \(it asks to wait 3,600 s"):
        add(client(gemini, tmp_path / "b", mode="online"), 2).execute_batch_task("t")


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_wrong_key_stops_the_task_and_is_never_shown(gemini: Gemini, tmp_path: Path, mode: str) -> None:
    made = add(client(gemini, tmp_path, mode=mode, api_key="AIza-wrong-key"), 2)
    with pytest.raises(TaskStopped, match="API key not valid") as caught:
        made.execute_batch_task("t")
    assert "AIza-wrong" not in str(caught.value)
    assert not gemini.paid


def test_keys_that_gemini_does_not_have_are_said_before_anything_is_sent(gemini: Gemini, tmp_path: Path) -> None:
    with pytest.raises(SynthError, match=r"no 'logit_bias'"):
        add(client(gemini, tmp_path), logit_bias={})
    with pytest.raises(SynthError, match=r"no 'safetySetting'; did you mean 'safetySettings'"):
        add(client(gemini, tmp_path), safetySetting=[])


def test_a_lost_reply_to_a_call_that_makes_a_batch_never_pays_twice(gemini: Gemini, tmp_path: Path) -> None:
    def lost(handler: Any) -> bool:
        gemini.begun(json.loads(handler.content)["batch"])
        return reset(handler)

    add(client(gemini, tmp_path / "other"), 3, task="o").execute_batch_task("o")
    gemini.faults["POST /v1beta/models/m:batchGenerateContent"] = [lost]
    assert texts(add(client(gemini, tmp_path)).execute_batch_task("t")) == WANTED
    assert len(gemini.batches) == 2
    assert max(gemini.paid.values()) == 2  # q0 to q2 are asked in both folders


def test_errors_inside_a_batch_are_told_apart(gemini: Gemini, tmp_path: Path) -> None:
    gemini.ends = {"q1": {"code": 3, "message": "bad"}, "q2": {"code": 14, "message": "busy"}}
    made = add(client(gemini, tmp_path, max_rounds=2), 4)
    responses = made.execute_batch_task("t", on_error="return")
    assert [r["error"] is not None for r in responses] == [False, True, True, False]
    gemini.ends = {}
    responses = made.execute_batch_task("t", on_error="return")  # what was busy is sent again, what was refused is not
    assert [r["error"] is not None for r in responses] == [False, True, False, False]


def test_a_batch_that_fails_or_is_cancelled_is_named(gemini: Gemini, tmp_path: Path) -> None:
    gemini.state = "BATCH_STATE_RUNNING"
    made = add(client(gemini, tmp_path))
    made.execute_batch_task("t", wait=False, on_error="return")
    assert made.cancel("t") == ["batches/b0"]
    gemini.state = "BATCH_STATE_SUCCEEDED"
    made.execute_batch_task("t", wait=False, on_error="return")
    assert texts(made.execute_batch_task("t")) == WANTED
    assert set(gemini.paid.values()) == {1}
    assert re.fullmatch(r"posttrain-[0-9a-f]{32}", gemini.batches["batches/b0"]["metadata"]["displayName"])
