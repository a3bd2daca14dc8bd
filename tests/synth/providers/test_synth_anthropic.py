"""Anthropic's Messages and batches, against a server on a real socket that speaks them."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from synth_server import Handler, Server, add, error, reset, texts

from posttrain.errors import SynthError
from posttrain.synth import AnthropicSynth, Compare, Generate, Judge, Pipeline, Price, TaskStopped
from posttrain.synth.sending.wires.anthropic import from_wire, to_wire

WANTED = [f"re: q{i}" for i in range(7)]

pytestmark = pytest.mark.usefixtures("hasty")


def message(params: dict[str, Any]) -> dict[str, Any]:
    """What Anthropic answers; it refuses what it refuses."""
    assert params["max_tokens"] > 0
    assert all(m["role"] in ("user", "assistant") and m["content"] for m in params["messages"])
    text = params["messages"][-1]["content"][-1].get("text", "")
    content = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": f"re: {text}"}]
    usage = {"input_tokens": 10, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 5}
    return {
        "id": "msg", "type": "message", "role": "assistant", "model": params["model"], "content": content,
        "stop_reason": "end_turn", "usage": usage,
    }  # fmt: skip


class Anthropic(Server):
    """Messages and their batches; `paid` counts by the text of the last message."""

    def __init__(self) -> None:
        super().__init__()
        self.says = message
        self.ends: dict[str, str] = {}
        """Text of a request -> what becomes of it in a batch, if it does not succeed."""
        self.over = True
        self.http.RequestHandlerClass = type("A", (Speaks,), {"server_": self})  # type: ignore[assignment]

    def begun(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        made = {
            "id": f"batch-{len(self.batches)}", "type": "message_batch", "processing_status": "in_progress",
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(), "cancel_initiated_at": None,
            "request_counts": {"processing": len(requests), "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0},
        }  # fmt: skip
        self.batches[made["id"]] = made
        self.contents[made["id"]] = json.dumps(requests).encode()
        return made

    def results(self, name: str) -> bytes:
        lines = []
        for request in json.loads(self.contents[name]):
            text = request["params"]["messages"][-1]["content"][-1]["text"]
            kind = self.ends.get(text, "succeeded")
            result: dict[str, Any] = {"type": kind}
            if kind == "succeeded":
                self.paid[text] += 1
                result["message"] = self.says(request["params"])
            elif kind == "errored":
                inner = {"type": "invalid_request_error", "message": "too long"}
                result["error"] = {"type": "error", "error": inner, "request_id": "r"}
            lines.append(json.dumps({"custom_id": request["custom_id"], "result": result}).encode() + b"\n")
        return b"".join(reversed(lines))


class Speaks(Handler):
    server_: Anthropic

    def answer(self, key: str, path: str) -> None:
        server = self.server_
        assert self.headers["anthropic-version"] == "2023-06-01"
        if self.headers["x-api-key"] != "sk-ant-0123456789":
            said = {"type": "authentication_error", "message": "invalid x-api-key"}
            return self.json({"type": "error", "error": said}, 401)
        name = path.split("/")[3] if path.count("/") > 2 else ""
        with server.lock:
            if key == "POST /messages":
                body = json.loads(self.content)
                server.bodies.append((path, body))
                reply = server.says(body)
                server.paid[body["messages"][-1]["content"][-1].get("text", "")] += 1
                return self.json(reply, request_id="req-1")
            if key == "POST /messages/batches":
                return self.json(server.begun(json.loads(self.content)["requests"]))
            if key == "GET /messages/batches":
                found = list(server.batches.values())[::-1]
                start = next((i + 1 for i, b in enumerate(found) if b["id"] == self.query.get("after_id")), 0)
                return self.json({"data": found[start : start + 2], "has_more": start + 2 < len(found)})
            if key.endswith("/cancel"):
                server.batches[name].update(processing_status="canceling", cancel_initiated_at="2026-11-26T12:00:00Z")
                return self.json(server.batches[name])
            if key.endswith("/results"):
                return self.send(200, server.results(name))
            batch = server.batches[name]
            if server.over or batch["processing_status"] == "canceling":
                batch["processing_status"] = "ended"
            return self.json(batch)


@pytest.fixture
def anthropic() -> Any:
    made = Anthropic()
    yield made
    made.close()


def client(server: Server, folder: Path, **more: Any) -> AnthropicSynth:
    given = {"api_key": "sk-ant-0123456789", "poll_every": 0.01, "reconcile_after": 0.01, **more}
    return AnthropicSynth(base_url=server.url, work_dir=folder, **given)


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_results_are_in_order_and_paid_once_in_both_modes(anthropic: Anthropic, tmp_path: Path, mode: str) -> None:
    made = add(client(anthropic, tmp_path, mode=mode, prices={"m": Price(input=2, output=4)}), max_tokens=9)
    for _ in range(2):
        responses = made.execute_batch_task("t")
        assert texts(responses) == WANTED
    assert set(anthropic.paid.values()) == {1}
    assert len(anthropic.paid) == 7
    body = responses[0]["response"]["body"]
    assert body["choices"][0]["message"]["reasoning_content"] == "hm"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert made.status("t").cost == pytest.approx(7 * (17 * 2 + 5 * 4) / (2 if mode == "batch" else 1) / 1e6)
    assert made.status("t").cached_tokens == 7 * 4
    other = add(client(anthropic, tmp_path, mode="online" if mode == "batch" else "batch"), max_tokens=9)
    assert texts(other.execute_batch_task("t")) == WANTED  # one mode takes over from the other
    assert set(anthropic.paid.values()) == {1}


def test_a_chat_is_put_into_anthropics_words_and_back() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    made = to_wire({
        "model": "m", "max_completion_tokens": 5, "stop": "END", "top_k": 3, "thinking": {"type": "enabled"},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
        "tool_choice": "required",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [
                {"type": "text", "text": "see"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
            ]},
            {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "d"}]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            {"role": "tool", "tool_call_id": "d", "content": "2"},
        ],
    })  # fmt: skip
    assert made == {
        "model": "m", "max_tokens": 5, "stop_sequences": ["END"], "top_k": 3, "thinking": {"type": "enabled"},
        "tools": [{"name": "f", "description": "d", "input_schema": schema}], "tool_choice": {"type": "any"},
        "system": [{"type": "text", "text": "be kind"}],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "see"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}},
            ]},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "d", "name": "f", "input": {"x": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "1"}]},
                {"type": "tool_result", "tool_use_id": "d", "content": [{"type": "text", "text": "2"}]},
            ]},
        ],
    }  # fmt: skip
    used = {"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}
    reply = from_wire({"type": "message", "content": [used], "stop_reason": "tool_use", "model": "m"})
    assert reply["choices"][0] == {
        "index": 0, "message": {"role": "assistant", "content": None, "tool_calls": [call]},
        "finish_reason": "tool_calls",
    }  # fmt: skip


def test_a_form_is_asked_for_by_a_tool(anthropic: Anthropic, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}

    def says(params: dict[str, Any]) -> dict[str, Any]:
        assert params["tool_choice"] == {"type": "tool", "name": "reply"}
        assert params["tools"][0]["input_schema"] == schema
        used = {"type": "tool_use", "id": "c", "name": "reply", "input": {"year": 1999}}
        return {**message(params), "content": [used], "stop_reason": "tool_use"}

    anthropic.says = says
    step = Generate(model="m", schema=schema, body={"max_tokens": 9})
    (row,) = Pipeline([step]).run([{"prompt": "q"}], client(anthropic, tmp_path, mode="online"), "p").rows()
    assert row["year"] == 1999


@pytest.mark.parametrize("fault", [reset, error(502)], ids=["reset", "502"])
def test_a_lost_reply_to_a_call_that_makes_a_batch_never_pays_twice(
    anthropic: Anthropic, tmp_path: Path, fault: Any
) -> None:
    def lost(handler: Any) -> bool:
        anthropic.begun(json.loads(handler.content)["requests"])
        return bool(fault(handler))

    add(client(anthropic, tmp_path / "other"), max_tokens=9, task="o").execute_batch_task("o")  # another's, as large
    older = dict(anthropic.batches)
    for batch in older.values():
        batch["created_at"] = "2026-01-01T00:00:00Z"
    anthropic.faults["POST /messages/batches"] = [lost]
    assert texts(add(client(anthropic, tmp_path), max_tokens=9).execute_batch_task("t")) == WANTED
    assert len(anthropic.batches) == len(older) + 1
    anthropic.faults["POST /messages/batches"] = [fault]  # and one that was never made is made
    assert len(add(client(anthropic, tmp_path), 3, task="u", max_tokens=8).execute_batch_task("u")) == 3


def test_a_batch_that_can_be_any_of_several_is_not_guessed(anthropic: Anthropic, tmp_path: Path) -> None:
    def lost(handler: Any) -> bool:
        for _ in range(2):
            anthropic.begun(json.loads(handler.content)["requests"])
        return reset(handler)

    anthropic.faults["POST /messages/batches"] = [lost]
    with pytest.raises(TaskStopped, match="it can be any of batch-1, batch-0"):
        add(client(anthropic, tmp_path), max_tokens=9).execute_batch_task("t")


def test_what_became_of_each_request_of_a_batch_is_told_apart(anthropic: Anthropic, tmp_path: Path) -> None:
    anthropic.ends = {"q1": "errored", "q2": "expired"}
    made = add(client(anthropic, tmp_path, max_rounds=2), 4, max_tokens=9)
    responses = made.execute_batch_task("t", on_error="return")
    assert [r["error"] and r["error"]["code"] for r in responses] == [
        None, "invalid_request_error", "batch_expired", None,
    ]  # fmt: skip
    anthropic.ends = {}
    responses = made.execute_batch_task(
        "t", on_error="return"
    )  # what has expired is sent again, what was refused is not
    assert [r["error"] is not None for r in responses] == [False, True, False, False]


def test_a_cancelled_batch_ends_and_can_go_on(anthropic: Anthropic, tmp_path: Path) -> None:
    anthropic.over = False
    made = add(client(anthropic, tmp_path), max_tokens=9)
    made.execute_batch_task("t", wait=False)
    assert made.cancel("t") == ["batch-0"]
    anthropic.over, anthropic.ends = True, {"q3": "canceled"}
    made.execute_batch_task("t", wait=False, on_error="return")
    anthropic.ends = {}
    assert texts(made.execute_batch_task("t")) == WANTED
    assert set(anthropic.paid.values()) == {1}


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_no_credit_and_a_wrong_key_stop_the_task(anthropic: Anthropic, tmp_path: Path, mode: str) -> None:
    made = add(client(anthropic, tmp_path, mode=mode, api_key="sk-ant-wrong"), 2, max_tokens=9)
    with pytest.raises(TaskStopped, match="authentication_error"):
        made.execute_batch_task("t")
    call = "POST /messages" if mode == "online" else "POST /messages/batches"
    low = "Your credit balance is too low to access the Anthropic API."
    anthropic.faults[call] = [error(400, kind="invalid_request_error", message=low)] * 9
    with pytest.raises(TaskStopped, match="credit balance is too low"):
        add(client(anthropic, tmp_path / "b", mode=mode), 2, max_tokens=9).execute_batch_task("t")


@pytest.mark.parametrize(
    ("body", "said"), [({}, "needs max_tokens"), ({"max_tokens": 5, "n": 2}, "one answer"), ({"max_tokens": 5, "seed": 1}, "no 'seed'")]
)  # fmt: skip
def test_what_anthropic_cannot_do_is_said_before_anything_is_sent(tmp_path: Path, body: Any, said: str) -> None:
    with pytest.raises(SynthError, match=said):
        AnthropicSynth(api_key="k", work_dir=tmp_path).body("m", [{"role": "user", "content": "q"}], body)


def test_a_judge_and_a_comparison_are_read_from_the_tool_that_is_called(anthropic: Anthropic, tmp_path: Path) -> None:
    def says(params: dict[str, Any]) -> dict[str, Any]:
        name = params["tool_choice"]["name"]
        given = {"rationale": "so", "score": 4} if name == "judgement" else {"rationale": "so", "winner": "A"}
        used = {"type": "tool_use", "id": "c", "name": name, "input": given}
        return {**message(params), "content": [used], "stop_reason": "tool_use"}

    anthropic.says = says
    made, body = client(anthropic, tmp_path, mode="online"), {"max_tokens": 99}
    (row,) = Pipeline([Judge(rubric="good", model="m", body=body)]).run(
        [{"prompt": "q", "response": "r"}], made, "j"
    ).rows()  # fmt: skip
    assert (row["score"], row["judgements"][0]["rationale"]) == (4, "so")
    compared = Pipeline([Compare(model="m", body=body, swap=False)])
    (row,) = compared.run([{"prompt": "q", "chosen": "a", "rejected": "b"}], made, "c").rows()
    assert row["votes"][0]["winners"] == ["chosen"]
    assert len(anthropic.bodies) == 2
