"""From prompts to training data: no row ever gets what another one was answered."""

import random
from pathlib import Path
from typing import Any

import pytest
from synth_server import by_length, chat, client, complete, error, expire, last, raw, reset, saying, short
from through import Row

from posttrain.blocks.data.rows.schemas import conversation
from posttrain.errors import DataError, SynthError
from posttrain.synth import (
    Drop,
    Generate,
    Judge,
    OpenAISynth,
    Pair,
    Pipeline,
    Reply,
    Report,
    Step,
    TransformersSynth,
    VllmSynth,
)


def pipeline() -> Pipeline:
    return Generate(template="{question}?", n=3, model="m") | Judge(rubric="good", model="j") | Pair()


def test_running_again_sends_nothing_and_gives_the_same_bytes(server: Any, tmp_path: Path) -> None:
    server.answer = saying(by_length)
    rows = [{"question": f"q{i}"} for i in range(12)]
    first = pipeline().run(rows, client(server, tmp_path), "t")
    bytes_of = {file.name: file.read_bytes() for file in (tmp_path / "t").iterdir()}
    sent = server.paid_lines
    assert sent == 12 * 3 * 2
    made = client(server, tmp_path)
    assert list(pipeline().run(rows, made, "t").rows()) == list(pipeline().run(rows, made, "t").rows())  # one client
    again = pipeline().run(rows, client(server, tmp_path), "t")
    assert server.paid_lines == sent
    assert {file.name: file.read_bytes() for file in (tmp_path / "t").iterdir()} == bytes_of
    assert list(again.rows()) == list(first.rows())
    assert [stage.rows_out for stage in again.stages][:3] == [12, 36, 36]
    assert Report.load(tmp_path / "t").stages == again.stages
    more = pipeline().run([*rows, {"question": "q12"}], client(server, tmp_path), "t")
    assert server.paid_lines == sent + 6  # only what is new
    assert list(more.rows())[: len(list(first.rows()))] == list(first.rows())


def test_every_row_is_accounted_for(server: Any, tmp_path: Path) -> None:
    server.answer = saying(by_length)
    server.faults["POST /chat/completions"] = [error(400, "content_policy")]
    report = pipeline().run([{"question": f"q{i}"} for i in range(4)], client(server, tmp_path), "t")
    generate = report.stages[1]
    assert generate.dropped == {"request failed: content_policy": 1}
    assert generate.failed == 1
    for stage in report.stages[1:3]:  # one row or one reason for each request
        assert stage.rows_out + sum(stage.dropped.values()) == stage.requests
    dropped = list(report.dropped())
    assert len(dropped) == sum(sum(stage.dropped.values()) for stage in report.stages)
    assert all(row["dropped"]["reason"] and row["dropped"]["step"] for row in dropped)
    assert report.export(tmp_path / "d.parquet", dropped=True) == len(dropped)


def test_no_row_gets_the_reply_of_another_whatever_fails(server: Any, tmp_path: Path) -> None:
    """Requests fail, connections break, replies are cut, lose their order in threads; some rows fail for good."""
    chance = random.Random(7)
    server.answer = saying(lambda body: f"echo of <{last(body)}>")
    kinds = [error(500), error(503), raw(b"{"), reset, short, error(400, "bad"), error(429, retry_after_ms="1")]
    server.faults["POST /chat/completions"] = [chance.choice([*kinds, lambda h: False]) for _ in range(160)]
    rows = [{"question": f"question {i} {i % 7}"} for i in range(100)]
    steps = Generate(template="{question}", n=2, model="m") | Generate(template="again {response}", model="m")
    report = steps.run(rows, client(server, tmp_path, attempts=3, concurrency=32), "t")
    out = list(report.rows())
    lost = [row for row in report.dropped() if row["dropped"]["step"] == "generate"]
    assert 0 < len(out) < 200  # the storm did hit
    assert len(out) + len(lost) == 200
    for row in out:
        assert row["response"] == f"echo of <again echo of <{row['question']}>>"
        assert row["prompt"][0]["content"] == f"again echo of <{row['question']}>"
    server.faults.clear()
    report = steps.run(rows, client(server, tmp_path), "t", retry_failed=True)
    assert [row["question"] for row in report.rows()] == [row["question"] for row in rows for _ in range(2)]


def test_batches_in_another_order_and_cut_short_change_nothing(server: Any, tmp_path: Path) -> None:
    polled: set[str] = set()

    def finish(server: Any, batch: dict[str, Any], lines: list[Any]) -> None:
        """Nothing is done at the first look. Of the first batch, 7 lines get done."""
        if batch["id"] in polled:
            (expire("expired", 7) if batch["id"] == "batch-0" else complete)(server, batch, lines)
            server.finish = finish
        polled.add(batch["id"])

    server.finish = finish
    made = OpenAISynth(base_url=server.url, api_key="sk-test-key", work_dir=tmp_path, poll_every=0, reconcile_after=0)
    steps = Generate(template="{question}", model="m") | Generate(template="again {response}", model="m")
    rows, unfinished = [{"question": f"q{i}"} for i in range(20)], []
    for _ in range(20):
        report = steps.run(rows, made, "t", wait=False)
        if not report.unfinished:
            break
        unfinished.append(report.unfinished)
    assert unfinished[0] == "step 1 (generate): 20 requests have no result yet, 20 of them are in batches"
    assert any(said.startswith("step 2") for said in unfinished)
    assert [row["response"] for row in report.rows()] == [f"re: again re: q{i}" for i in range(20)]
    assert server.paid_lines == 40


def test_a_step_whose_requests_change_is_refused(server: Any, tmp_path: Path) -> None:
    class Drawn(Generate):
        def prompt(self, row: Row) -> list[dict[str, Any]]:
            return [{"role": "user", "content": f"{row['q']} {random.random()}"}]

    with pytest.raises(SynthError, match="must be a function of the row alone"):
        Pipeline([Drawn(model="m")]).run([{"q": "a"}], client(server, tmp_path), "t")


def test_a_step_of_ones_own_needs_only_what_it_changes(server: Any, tmp_path: Path) -> None:
    class Shout(Step):
        def fold(self, row: Row, replies: list[Reply]) -> list[Row | Drop]:
            return [{"text": row["text"].upper()} if row["text"] else Drop(row, "empty")]

    report = Pipeline([Shout()]).run([{"text": "a"}, {"text": ""}], client(server, tmp_path), "t")
    assert list(report.rows()) == [{"text": "A"}]
    assert report.stages[1].dropped == {"empty": 1}
    assert server.calls == {}


def test_steps_may_have_a_client_of_their_own_and_share_the_ledger(server: Any, tmp_path: Path) -> None:
    server.answer = saying(by_length)
    judge = Judge(rubric="good", model="j", client=VllmSynth(base_url=server.url))
    report = (Generate(model="m") | judge).run([{"prompt": "hi"}], client(server, tmp_path), "t")
    assert [row["score"] for row in report.rows()]
    assert [path for path, _ in server.bodies] == ["/chat/completions"] * 2
    assert not (Path("runs/synth")).exists()


def test_the_bounds_hold_for_all_steps_together(server: Any, tmp_path: Path) -> None:
    server.answer = saying(by_length)
    with pytest.raises(SynthError, match="passes max_requests=1"):
        pipeline().run([{"question": "q"}], client(server, tmp_path), "t", max_requests=4)
    assert server.paid_lines == 3  # the first step fitted


def test_without_sending_it_says_what_the_first_open_step_would_send(server: Any, tmp_path: Path) -> None:
    server.answer = saying(by_length)
    report = pipeline().run([{"question": "q"}], client(server, tmp_path), "t", send=False)
    assert "step 1 (generate) has 3 requests" in report.unfinished
    with pytest.raises(SynthError, match="not finished"):
        report.rows()
    assert server.calls == {}


def test_requests_that_could_not_be_sent_are_said_before_any_is(server: Any, tmp_path: Path, tiny_model: Path) -> None:
    local = TransformersSynth(name_or_path=str(tiny_model))
    steps = Generate(template="{question}") | Judge(rubric="good", client=local, body={"seed": 1})
    with pytest.raises(SynthError) as told:
        steps.run([{"question": "q"}], client(server, tmp_path), "t")
    assert "step 1: OpenAISynth needs model=..." in str(told.value)
    assert "step 2: a model in this process takes" in str(told.value)
    assert "not seed" in str(told.value)
    assert server.calls == {}


def test_a_row_that_lacks_a_column_is_named(server: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0-source.jsonl:2: there is no column 'question'"):
        pipeline().run([{"question": "a"}, {"questions": "b"}], client(server, tmp_path), "t")


def test_a_rows_tools_are_sent_and_a_tool_call_is_an_answer(server: Any, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "f?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            {"role": "user", "content": "again"},
        ],
        "tools": tools,
    }
    made = chat({"messages": row["messages"]})
    made["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    server.answer = lambda body: (200, made)
    report = Pipeline([Generate(model="m")]).run([row], client(server, tmp_path), "t")
    ((_, sent),) = server.bodies
    assert sent["tools"] == tools
    assert sent["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'
    (out,) = report.rows()
    assert "response" not in out
    assert out["tools"] == tools
    assert conversation(out)["messages"][-1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    with pytest.raises(DataError, match="no list of tools"):
        Generate(model="m").chats({"prompt": "p", "tools": "none"})


def test_n_in_the_body_is_refused_before_it_is_paid(server: Any, tmp_path: Path) -> None:
    ((name, message),) = Generate(model="m", body={"n": 4}).check()
    assert (name, "give `n` of the step" in message) == ("body", True)
    with pytest.raises(SynthError, match="step 1: body: n pays"):
        Pipeline([Generate(model="m", body={"n": 4})]).run([{"prompt": "p"}], client(server, tmp_path), "t")
    assert server.paid_lines == 0
