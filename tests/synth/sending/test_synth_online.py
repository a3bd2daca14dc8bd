"""Requests one by one, against a server on a real socket."""

import socket
import subprocess
import sys
import threading
import time
import traceback
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from synth_server import KEY, Server, add, chat, client, error, raw, reset, short, texts

from posttrain.errors import SynthError
from posttrain.synth import IncompleteTask, Price, TaskStopped, VllmSynth


def test_results_are_as_many_as_the_inputs_and_in_their_order(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    add(made, 50)
    responses = made.execute_batch_task("t")
    assert texts(responses) == [f"re: q{i}" for i in range(50)]
    assert [r["custom_id"] for r in responses] == [f"t_{i}" for i in range(50)]
    assert server.paid_lines == 50
    first = made.extract_messages_from_responses(responses)[0]
    assert first == {"custom_id": "t_0", "choices": [{"role": "assistant", "content": "re: q0"}]}


def test_a_finished_task_sends_nothing_when_it_is_run_again(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        made = client(server, tmp_path)
        add(made, 10)
        assert len(made.execute_batch_task("t")) == 10
        made.ledger.close()
    assert server.paid_lines == 10
    assert server.calls["POST /chat/completions"] == 10


def test_the_same_prompt_twice_is_two_samples_and_twice_in_two_tasks_is_not(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    for task in ("a", "b"):
        for _ in range(2):
            made.add_chat_to_batch_task(task, [{"role": "user", "content": "q"}], model="m")
        assert len(made.execute_batch_task(task)) == 2
    assert server.paid["q"] == 2


def test_a_script_that_adds_fewer_requests_than_before_gets_as_many_results_as_it_added(
    server: Server, tmp_path: Path
) -> None:
    made = client(server, tmp_path)
    add(made, 9)
    made.execute_batch_task("t")
    made.ledger.close()
    again = client(server, tmp_path)
    add(again, 4)
    assert texts(again.execute_batch_task("t")) == [f"re: q{i}" for i in range(4)]
    assert server.paid_lines == 9


@pytest.mark.parametrize(
    "fault",
    [reset, short, raw(b"<html>"), raw(b'{"choices": ['), raw(b"{}"), error(500), error(503, "server_is_overloaded"),
     error(408), error(409), error(400, x_should_retry="true")],
    ids=["reset", "short", "html", "cut", "no choices", "500", "503", "408", "409", "should retry"],
)  # fmt: skip
def test_a_passing_fault_costs_no_row(server: Server, tmp_path: Path, fault: Any) -> None:
    made = client(server, tmp_path)
    add(made, 12)
    server.faults["POST /chat/completions"] = [fault] * 3
    assert texts(made.execute_batch_task("t")) == [f"re: q{i}" for i in range(12)]
    assert server.paid_lines == 12


def test_a_stalled_connection_is_given_up_after_the_timeout(server: Server, tmp_path: Path) -> None:
    gone = threading.Event()
    server.faults["POST /chat/completions"] = [lambda handler: gone.wait(20)]
    made = client(server, tmp_path, timeout=0.3)
    add(made, 3)
    assert len(texts(made.execute_batch_task("t"))) == 3
    gone.set()
    assert made.ledger.all("SELECT code FROM attempt") == [("timeout",)]


def test_attempts_are_counted_and_what_is_given_up_is_a_failure_in_its_place(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path, attempts=3)
    add(made, 5)
    server.answer = lambda body: (
        (500, {"error": {"message": "boom"}}) if body["messages"][0]["content"] == "q2" else (200, chat(body))
    )
    with pytest.raises(IncompleteTask, match="1 of 5 requests have no result") as caught:
        made.execute_batch_task("t")
    responses = caught.value.responses
    assert [r["custom_id"] for r in responses] == [f"t_{i}" for i in range(5)]
    assert responses[2]["response"] is None
    assert responses[2]["error"]["code"] == "http_500"
    assert made.ledger.one("SELECT count(*) FROM attempt")[0] == 3
    server.answer = lambda body: (200, chat(body))
    assert len(texts(made.execute_batch_task("t"))) == 5  # the next run tries it again
    assert server.paid_lines == 5


def test_a_refused_request_fails_alone_and_is_sent_again_only_when_asked_to(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    add(made, 5)
    server.answer = lambda body: (
        (400, {"error": {"message": "bad", "code": "invalid_prompt"}})
        if body["messages"][0]["content"] == "q2"
        else (200, chat(body))
    )
    assert made.execute_batch_task("t", on_error="return")[2]["error"]["code"] == "invalid_prompt"
    calls = server.calls["POST /chat/completions"]
    made.execute_batch_task("t", on_error="return")
    assert server.calls["POST /chat/completions"] == calls == 5
    server.answer = lambda body: (200, chat(body))
    assert len(texts(made.execute_batch_task("t", retry_failed=True))) == 5


def test_a_storm_uses_up_no_attempts_and_is_one_pause_for_all_lanes(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path, attempts=1)
    add(made, 60)
    server.delay = 0.03  # so that several are in flight together
    server.faults["POST /chat/completions"] = [error(429, "rate_limit_exceeded", retry_after="0.05")] * 24
    seen: list[Any] = []
    responses = made.execute_batch_task("t", progress=lambda p: seen.append((p.storms, p.retries)))
    assert texts(responses) == [f"re: q{i}" for i in range(60)]
    storms, retries = seen[-1]
    assert retries == 0
    assert 3 <= storms <= 20, "8 in flight are one storm, not 8"
    assert server.paid_lines == 60


@pytest.mark.parametrize(  # ids of their own: workers that collect in different seconds must find the same tests
    "header",
    ["1", "0.5", formatdate(time.time() - 5, usegmt=True), "soon", "-3", ""],
    ids=["1", "0.5", "a date", "soon", "-3", "nothing"],
)
def test_retry_after_is_understood_in_every_form(server: Server, tmp_path: Path, header: str) -> None:
    made = client(server, tmp_path)
    add(made, 2)
    server.faults["POST /chat/completions"] = [error(429, "slow_down", retry_after=header)]
    assert len(texts(made.execute_batch_task("t"))) == 2


@pytest.mark.parametrize(
    "fault",
    [error(429, "insufficient_quota", "insufficient_quota"), error(429, "", "insufficient_quota"), error(401, "invalid_api_key"), error(402)],
    ids=["429 code", "429 type", "401", "402"],
)  # fmt: skip
def test_no_quota_or_a_refused_key_stops_the_task_and_keeps_everything(
    server: Server, tmp_path: Path, fault: Any
) -> None:
    made = client(server, tmp_path, concurrency=1)
    add(made, 10)
    server.faults["POST /chat/completions"] = [lambda handler: False] * 4 + [fault]
    with pytest.raises(TaskStopped, match="4 of 10 results are kept"):
        made.execute_batch_task("t")
    assert server.calls["POST /chat/completions"] == 5
    assert len(texts(made.execute_batch_task("t"))) == 10
    assert server.paid_lines == 10


def test_when_everything_is_refused_for_one_reason_the_task_stops_early_and_can_be_run_again(
    server: Server, tmp_path: Path
) -> None:
    made = client(server, tmp_path, concurrency=2)
    add(made, 200)
    server.answer = lambda body: (404, {"error": {"message": "no model m", "code": "model_not_found"}})
    with pytest.raises(TaskStopped, match="no model m"):
        made.execute_batch_task("t")
    assert server.calls["POST /chat/completions"] < 30
    server.answer = lambda body: (200, chat(body))
    assert len(texts(made.execute_batch_task("t"))) == 200


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_reply_that_was_cut_is_a_result(server: Server, tmp_path: Path, reason: str) -> None:
    made = client(server, tmp_path)
    add(made, 2)
    answer = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": reason}],
        "usage": None,
    }
    server.answer = lambda body: (200, answer)
    assert [r["response"]["body"] for r in made.execute_batch_task("t")] == [answer, answer]
    assert server.paid_lines == 2


def test_bounds_are_held_before_anything_is_sent(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path, prices={"m": Price(input=1, output=100)})
    add(made, 10, max_tokens=100)
    plan = made.plan("t")
    assert (plan.new, plan.cached, plan.output_tokens) == (10, 0, 1000)
    assert plan.cost == pytest.approx(0.1, rel=0.01)
    with pytest.raises(TaskStopped, match="passes max_cost"):
        made.execute_batch_task("t", max_cost=0.05)
    with pytest.raises(TaskStopped, match="passes max_requests=9"):
        made.execute_batch_task("t", max_requests=9)
    with pytest.raises(TaskStopped, match="no price for m"):
        client(server, tmp_path).execute_batch_task("t", max_cost=9)
    assert server.paid_lines == 0
    made.execute_batch_task("t", max_cost=0.2, max_requests=10)
    assert made.status("t").cost == pytest.approx(10 * (10 + 500) / 1e6)
    assert made.plan("t").cached == 10


def test_repeated_attempts_count_against_max_requests(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path, concurrency=1, attempts=5)
    add(made, 4)
    server.faults["POST /chat/completions"] = [error(500)] * 3
    with pytest.raises(TaskStopped, match="max_requests=4 is used up"):
        made.execute_batch_task("t", max_requests=4)
    assert server.calls["POST /chat/completions"] == 4


@pytest.mark.parametrize("bound", ["rpm", "tpm"])
def test_requests_and_tokens_per_minute_are_bounds(bound: str, server: Server, tmp_path: Path) -> None:
    measured = client(server, tmp_path / "measured")
    add(measured, 1, max_tokens=100)
    plan = measured.plan("t")
    used = {"prompt_tokens": plan.input_tokens, "completion_tokens": plan.output_tokens}
    server.calls.clear()
    server.answer = lambda body: (200, {**chat(body), "usage": used})
    made = client(server, tmp_path, **{bound: 5 if bound == "rpm" else 5 * (plan.input_tokens + plan.output_tokens)})
    add(made, 9, max_tokens=100)
    session = made._session("t", None, None, lambda p: None, True)
    worker = threading.Thread(target=lambda: made.send(session))
    worker.start()
    deadline = time.monotonic() + 20
    while made.status("t").done < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    session.stop()
    worker.join(20)
    assert server.calls["POST /chat/completions"] == 5


def test_the_key_reaches_no_file_no_message_and_no_repr(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = client(server, tmp_path, concurrency=1)
    add(made, 3)
    server.faults["POST /chat/completions"] = [
        error(500, message=f"Bearer {KEY}"),
        error(401, message=f"wrong key {KEY}"),
    ]
    with pytest.raises(TaskStopped) as caught:
        made.execute_batch_task("t")
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    made.ledger.one("PRAGMA wal_checkpoint(TRUNCATE)")
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert any(h.get("Authorization") == f"Bearer {KEY}" for h in server.headers_seen)
    for text in (shown, str(caught.value), repr(made), repr(made.online_service()), caplog.text):
        assert KEY not in text
    assert KEY.encode() not in stored
    assert b"[secret]" in stored


def test_a_second_process_on_the_same_folder_is_refused(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    add(made, 1)
    made.execute_batch_task("t")
    code = f"from posttrain.synth import OpenAISynth; OpenAISynth(work_dir={str(tmp_path)!r}).plan('t')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is in use by another process (pid" in done.stderr
    made.ledger.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_server_that_is_down_makes_the_task_wait_and_a_server_that_stays_down_stops_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    made = VllmSynth(base_url=url, work_dir=tmp_path, patience=0.3)
    add(made, 5)
    with pytest.raises(
        TaskStopped,
        match=r"no_server: no answers from http://127.0.0.1:.*\(Connection refused\).*0 of 5 results are kept in",
    ):
        made.execute_batch_task("t")
    assert made.status("t").failed == 0


def test_of_several_servers_the_ones_that_answer_do_the_work(server: Server, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    other = Server()
    made = VllmSynth(base_url=[dead, server.url, other.url], work_dir=tmp_path, concurrency=8)
    server.delay = other.delay = 0.01
    add(made, 60)
    assert texts(made.execute_batch_task("t")) == [f"re: q{i}" for i in range(60)]
    other.close()
    assert server.paid_lines + other.paid_lines == 60
    assert min(server.paid_lines, other.paid_lines) > 10


def test_vllm_gets_its_own_parameters_and_refuses_those_it_would_ignore(server: Server, tmp_path: Path) -> None:
    made = VllmSynth(base_url=server.url, work_dir=tmp_path, sampling_params={"temperature": 0.5, "top_k": 3})
    add(made, 1, temperature=0.1)
    made.execute_batch_task("t")
    path, body = server.bodies[0]
    assert path == "/chat/completions"
    assert (body["temperature"], body["top_k"]) == (0.1, 3)
    with pytest.raises(SynthError, match="structured_outputs"):
        add(made, 1, guided_choice=["a"])
    server.answer = lambda body: (200, {"data": [{"probs": [-0.2]}]})
    made.add_request_to_batch_task(
        "r", "/classify", {"model": "rm", "messages": [{"role": "user", "content": "x"}], "use_activation": False}
    )
    assert made.execute_batch_task("r")[0]["response"]["body"]["data"][0]["probs"] == [-0.2]
    assert server.bodies[-1][0] == "/classify"


def test_the_order_of_keys_in_a_schema_is_kept(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    schema = {"type": "object", "properties": {"rationale": {}, "a_score": {}}}
    add(made, 1, response_format={"type": "json_schema", "json_schema": {"name": "j", "schema": schema}})
    made.execute_batch_task("t")
    assert list(server.bodies[0][1]["response_format"]["json_schema"]["schema"]["properties"]) == [
        "rationale",
        "a_score",
    ]


def test_a_full_disk_is_said_and_costs_nothing_that_was_committed(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path, concurrency=4)
    add(made, 400)
    made.plan("t")
    pages = made.ledger.one("PRAGMA page_count")[0]
    made.ledger.one(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(SynthError, match="cannot be written: database or disk is full"):
        made.execute_batch_task("t")
    kept = made.status("t").done
    assert 0 < kept < 400
    made.ledger.one(f"PRAGMA max_page_count = {pages + 10_000}")
    assert len(texts(made.execute_batch_task("t"))) == 400
    assert server.paid_lines <= 400 + 4


def test_rows_are_read_by_the_trainers(server: Server, tmp_path: Path) -> None:
    from posttrain.blocks.data.rows.schemas import conversation
    from posttrain.blocks.data.sources import Source

    made = client(server, tmp_path / "run")
    for i in range(3):
        made.add_chat_to_batch_task("t", [{"role": "user", "content": f"q{i}"}], model="m", keep={"answer": i}, n=2)
    made.execute_batch_task("t")
    assert made.to_jsonl("t", tmp_path / "a.jsonl") == made.to_parquet("t", tmp_path / "a.parquet") == 6
    for name in ("a.jsonl", "a.parquet"):
        source = Source(name_or_path=str(tmp_path / name))
        rows = [row for row, _ in source.read(source.open())]
        chats = [conversation(row.values)["messages"] for row in rows]
        assert [c[1]["content"] for c in chats] == ["re: q0", "re: q0", "re: q1", "re: q1", "re: q2", "re: q2"]
        assert [row.values["answer"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert made.to_dataset("t").num_rows == 6


def test_ctrl_c_waits_for_what_is_in_flight_and_keeps_it(server: Server, tmp_path: Path) -> None:
    import os
    import signal

    made = client(server, tmp_path, concurrency=4)
    server.delay = 0.05
    add(made, 100)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt, match="of 100 results are kept; run the same again"):
        made.execute_batch_task("t")
    assert made.status("t").done == server.paid_lines < 100
    server.delay = 0
    assert len(texts(made.execute_batch_task("t"))) == 100
    assert server.paid_lines == 100


CHILD = """
import json, sys
from posttrain.synth import OpenAISynth
made = OpenAISynth(api_key="k", mode="online", concurrency=8, base_url=sys.argv[1], work_dir=sys.argv[2])
for i in range(300):
    made.add_chat_to_batch_task("t", [{"role": "user", "content": f"q{i}"}], model="m")
print(len(made.execute_batch_task("t")))
"""


@pytest.mark.parametrize("after", [1, 40, 150])
def test_kill_9_pays_again_for_what_was_in_flight_at_most(server: Server, tmp_path: Path, after: int) -> None:
    server.delay = 0.005
    child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(tmp_path)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while server.paid_lines < after and time.monotonic() < deadline:
        time.sleep(0.001)
    child.kill()
    child.communicate()
    assert after <= server.paid_lines < 300
    done = subprocess.run([sys.executable, "-c", CHILD, server.url, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "300", done.stderr
    assert 300 <= server.paid_lines <= 300 + 8
    again = subprocess.run([sys.executable, "-c", CHILD, server.url, str(tmp_path)], capture_output=True, text=True)
    assert again.stdout.strip() == "300"
    assert server.paid_lines <= 300 + 8


def test_a_terminal_shows_how_a_run_goes_unless_told_otherwise(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    import rich.console

    screen = io.StringIO()
    real = rich.console.Console

    def console(**given: Any) -> Any:
        return real(file=screen, force_terminal=True, width=120, color_system=None)

    monkeypatch.setattr(rich.console, "Console", console)
    made = client(server, tmp_path)
    made.add_chat_to_batch_task("hello", [{"role": "user", "content": "hi"}], model="m")
    made.run("hello")
    assert "1/1 done" in screen.getvalue()
    seen = []
    made.add_chat_to_batch_task("again", [{"role": "user", "content": "ho"}], model="m")
    screen.truncate(0)
    made.run("again", progress=seen.append)
    assert seen and "done" not in screen.getvalue()
