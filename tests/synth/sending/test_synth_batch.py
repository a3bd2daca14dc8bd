"""Batches, against a server on a real socket that counts every paid line."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synth_server import (
    Server,
    add,
    complete,
    error,
    expire,
    lost,
    output_line,
    pay,
    raw,
    reset,
    short,
    texts,
    written,
)

from posttrain.synth import AzureOpenAISynth, IncompleteTask, OpenAISynth, Price, TaskStopped

WANTED = [f"re: q{i}" for i in range(7)]


def client(server: Server, folder: Path, **more: Any) -> OpenAISynth:
    return OpenAISynth(
        api_key="sk-0123456789",
        base_url=server.url,
        work_dir=folder,
        **{"poll_every": 0.01, "reconcile_after": 0.01, **more},
    )


def test_a_batch_returns_every_result_in_order_and_pays_once(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path))
    assert texts(made.execute_batch_task("t")) == WANTED
    assert texts(made.execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7
    assert server.calls["POST /batches"] == server.calls["POST /files"] == 1
    (batch,) = server.batches.values()
    line = json.loads(server.contents[batch["input_file_id"]].splitlines()[0])
    assert (line["method"], line["url"], batch["endpoint"]) == ("POST", "/v1/chat/completions", "/v1/chat/completions")
    assert line["body"] == {"model": "m", "messages": [{"role": "user", "content": "q0"}]}


def test_files_are_split_by_lines_by_bytes_and_by_model(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = add(client(server, tmp_path, batch_size=3))
    made.add_chat_to_batch_task("t", [{"role": "user", "content": "other"}], model="n")
    assert len(texts(made.execute_batch_task("t"))) == 8
    sizes = sorted(len(server.contents[b["input_file_id"]].splitlines()) for b in server.batches.values())
    assert sizes == [1, 1, 3, 3]
    import attrs

    small = client(server, tmp_path / "b")
    service = attrs.evolve(small.batch_service(), max_bytes=400)
    monkeypatch.setattr(OpenAISynth, "batch_service", lambda self: service)
    before = set(server.batches)
    assert texts(add(small).execute_batch_task("t")) == WANTED
    new = [server.contents[b["input_file_id"]] for name, b in server.batches.items() if name not in before]
    assert len(new) > 1
    assert all(len(content) <= 400 for content in new)


@pytest.mark.parametrize("status", ["expired", "failed", "completed"])
@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("say", [True, False])
def test_every_end_takes_in_what_is_there_and_plans_only_the_rest(
    server: Server, tmp_path: Path, status: str, keep: int, say: bool
) -> None:
    server.finish = expire(status, keep, say)
    assert texts(add(client(server, tmp_path)).execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7
    assert [len(server.contents[b["input_file_id"]].splitlines()) for b in server.batches.values()] == [7, 7 - keep]


def test_a_request_that_never_gets_a_verdict_is_given_up_after_some_rounds(server: Server, tmp_path: Path) -> None:
    def silent(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        odd = [
            {"custom_id": x["custom_id"], "response": {"status_code": 0, "request_id": "", "body": {}}, "error": None}
            for x in lines
            if "q3" in str(x)
        ]
        rest = [x for x in lines if "q3" not in str(x)]
        pay(server, rest)
        batch.update(
            status="completed",
            output_file_id=server.store(written([output_line(x) for x in rest])),
            error_file_id=server.store(written(odd)),
        )

    server.finish = silent
    made = add(client(server, tmp_path))
    with pytest.raises(IncompleteTask, match="no_status"):
        made.execute_batch_task("t")
    assert len(server.batches) == 3
    server.finish = complete
    assert texts(made.execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7


def test_errors_of_lines_are_told_apart(server: Server, tmp_path: Path) -> None:
    def mixed(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        server.finish = complete
        pay(server, lines[2:])
        bad = output_line(lines[0], 400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
        busy = output_line(lines[1], 429, {"error": {"message": "busy", "code": "rate_limit_exceeded"}})
        batch.update(
            status="completed",
            output_file_id=server.store(written([output_line(x) for x in lines[2:]])),
            error_file_id=server.store(written([bad, busy])),
        )

    server.finish = mixed
    responses = add(client(server, tmp_path)).execute_batch_task("t", on_error="return")
    assert responses[0]["error"] == {
        "code": "context_length_exceeded",
        "message": "too long",
        "status_code": 400,
        "request_id": "r",
    }
    assert texts(responses[1:]) == WANTED[1:]
    assert server.paid_lines == 6


def test_unknown_duplicated_and_unreadable_lines_change_nothing_and_are_kept(server: Server, tmp_path: Path) -> None:
    def messy(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        pay(server, lines)
        good = [output_line(x) for x in lines]
        other = json.loads(json.dumps(good[0]))
        other["response"]["body"]["choices"][0]["message"]["content"] = "another"
        stranger = {**good[0], "custom_id": "f" * 32}
        content = (
            b"\xef\xbb\xbf" + written([*good, good[1], other, stranger, {**good[2], "custom_id": 5}]) + b"{broken\n\n"
        )
        batch.update(status="completed", output_file_id=server.store(content), error_file_id="")

    server.finish = messy
    made = add(client(server, tmp_path))
    assert texts(made.execute_batch_task("t")) == WANTED
    why = sorted(row[0] for row in made.ledger.all("SELECT why FROM stray"))
    assert why == ["another result for the same request", "not readable", "unknown custom_id", "unknown custom_id"]
    assert server.paid_lines == 7


@pytest.mark.parametrize(
    "fault",
    [short, reset, error(500), error(404), raw(b'{"custom_id": "')],
    ids=["short", "reset", "500", "404", "cut"],
)
def test_a_download_that_breaks_is_fetched_again(server: Server, tmp_path: Path, fault: Any) -> None:
    server.faults["GET /files/ID/content"] = [fault] * 2
    assert texts(add(client(server, tmp_path)).execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7
    assert len(server.batches) == 1


@pytest.mark.parametrize("call", ["POST /files", "POST /batches"])
@pytest.mark.parametrize(
    "fault", [lost, reset, error(500), error(502), raw(b"<html>")], ids=["lost", "reset", "500", "502", "html"]
)
def test_a_lost_reply_to_upload_or_create_never_pays_twice(
    server: Server, tmp_path: Path, call: str, fault: Any
) -> None:
    server.faults[call] = [fault]
    assert texts(add(client(server, tmp_path)).execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7
    assert len(server.batches) == 1, "one batch, whether or not the lost call had made it"
    if call == "POST /files" and fault is lost:
        assert server.calls["POST /files"] == 1, "the file is found by its name"


def test_a_batch_without_room_waits_and_comes_back_smaller(server: Server, tmp_path: Path) -> None:
    def full(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        server.finish = complete
        errors = [
            {"code": "token_limit_exceeded", "line": None, "message": "Enqueued token limit reached", "param": None}
        ]
        batch.update(status="failed", errors={"object": "list", "data": errors})

    server.finish = full
    server.faults["POST /batches"] = [
        error(400, "token_limit_exceeded"),
        error(400, message="Cannot find file x"),
        error(429),
    ]
    assert texts(add(client(server, tmp_path)).execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7
    assert [len(server.contents[b["input_file_id"]].splitlines()) for b in server.batches.values()] == [7, 3, 3, 1]


def test_a_batch_that_the_server_finds_wrong_stops_the_task_with_its_reasons(server: Server, tmp_path: Path) -> None:
    def wrong(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        batch.update(status="failed", errors={"data": [{"code": "model_not_found", "line": 4, "message": "no m"}]})

    server.finish = wrong
    with pytest.raises(TaskStopped, match=r"model_not_found \(line 4\): no m"):
        add(client(server, tmp_path)).execute_batch_task("t")
    assert server.paid_lines == 0


@pytest.mark.parametrize("call", ["POST /files", "POST /batches", "GET /batches/ID", "GET /files/ID/content"])
def test_a_refused_key_stops_the_task_anywhere_and_the_next_run_goes_on(
    server: Server, tmp_path: Path, call: str
) -> None:
    server.faults[call] = [error(401, "invalid_api_key", message="wrong sk-0123456789")]
    made = add(client(server, tmp_path))
    with pytest.raises(TaskStopped, match="invalid_api_key") as caught:
        made.execute_batch_task("t")
    assert "sk-0123456789" not in str(caught.value)
    assert texts(made.execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7


def test_a_batch_that_has_vanished_is_not_paid_again_unasked(server: Server, tmp_path: Path) -> None:
    def gone(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        pay(server, lines)
        del server.batches[batch["id"]]
        server.finish = complete

    server.finish = gone
    made = add(client(server, tmp_path))
    responses = made.execute_batch_task("t", on_error="return")
    assert {r["error"]["code"] for r in responses} == {"batch_vanished"}
    made.execute_batch_task("t", on_error="return")
    assert server.paid_lines == 7


def test_the_steps_one_by_one_from_several_processes(server: Server, tmp_path: Path) -> None:
    def fresh() -> OpenAISynth:
        made = client(server, tmp_path)
        made.ledger.close()
        return client(server, tmp_path)

    add(fresh()).save_batch_task("t")
    (file,) = (tmp_path / "batches").iterdir()
    assert file.read_bytes().count(b"\n") == 7
    fresh().upload_batch_task("t")
    assert len(fresh().retrieve_uploaded_files("t")) == 1
    assert not server.batches
    made = fresh()
    made.submit_batch_task("t")
    assert made.plan("t").waiting == 7
    assert {r["error"]["code"] for r in made.download_batch_task("t")} == {"pending"}
    assert made.retrieve_batch_task("t")[0]["status"] == "completed"
    assert texts(fresh().download_batch_task("t")) == WANTED
    assert server.paid_lines == 7


def test_submitting_without_waiting_and_coming_back_later(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path))
    server.finish = lambda *batch: None  # it stays under way
    assert {r["error"]["code"] for r in made.execute_batch_task("t", wait=False)} == {"pending"}
    assert len(server.batches) == 1
    server.finish = complete
    assert texts(made.execute_batch_task("t", wait=False)) == WANTED
    assert server.paid_lines == 7


def test_a_cancelled_task_keeps_what_was_done_and_can_go_on(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path))
    server.finish = lambda *batch: None
    made.execute_batch_task("t", wait=False)
    assert made.cancel("t") == ["batch-0"]
    assert texts(made.execute_batch_task("t")) == WANTED
    assert server.paid_lines == 7
    assert len(server.batches) == 2


def test_batches_cost_half(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path, prices={"m": Price(input=2, output=4)}))
    made.execute_batch_task("t")
    assert made.status("t").cost == pytest.approx(7 * (10 * 2 + 5 * 4) / 2 / 1e6)


@pytest.mark.parametrize("version", [None, "2024-10-21"])
def test_azure_speaks_both_of_its_interfaces(server: Server, tmp_path: Path, version: str | None) -> None:
    base = server.url.removesuffix("/v1")
    made = AzureOpenAISynth(
        api_key="azure-key", azure_endpoint=base, api_version=version, work_dir=tmp_path, poll_every=0.01
    )
    assert texts(add(made).execute_batch_task("t")) == WANTED
    (batch,) = server.batches.values()
    line = json.loads(server.contents[batch["input_file_id"]].splitlines()[0])
    assert line["url"] == batch["endpoint"] == ("/chat/completions" if version else "/v1/chat/completions")
    assert {h.get("api-key") for h in server.headers_seen} == {"azure-key"}
    online = AzureOpenAISynth(
        api_key="k", azure_endpoint=base, api_version=version, work_dir=tmp_path / "o", mode="online"
    )
    assert texts(add(online).execute_batch_task("t")) == WANTED
    assert server.bodies[0][0] == ("/deployments/m/chat/completions" if version else "/chat/completions")


# -- kill -9 --------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
import httpx
from posttrain.synth import OpenAISynth
from posttrain.synth.sending.batches import calls
from posttrain.synth.ledger.store import Ledger
calls.FIRST_BACKOFF = 0.01
point, at = 0, int(sys.argv[3])

def around(cls, name):
    whole = getattr(cls, name)
    def counted(*arguments, **named):
        reached()
        made = whole(*arguments, **named)
        reached()
        return made
    setattr(cls, name, counted)

def reached():
    global point
    point += 1
    if point == at:
        os.kill(os.getpid(), signal.SIGKILL)

around(Ledger, "_commit")
around(httpx.HTTPTransport, "handle_request")
around(Path, "rename")
around(Path, "unlink")
made = OpenAISynth(api_key="k", base_url=sys.argv[1], work_dir=sys.argv[2], poll_every=0.01, reconcile_after=0.01, batch_size=4)
for i in range(7):
    made.add_chat_to_batch_task("t", [{"role": "user", "content": f"q{i}"}], model="m")
responses = made.execute_batch_task("t")
print(point, [r["response"]["body"]["choices"][0]["message"]["content"] for r in responses])
"""


def child(server: Server, folder: Path, at: int) -> "subprocess.CompletedProcess[str]":
    """Run the whole task in a process of its own, which kills itself at its `at`-th boundary."""
    return subprocess.run(
        [sys.executable, "-c", CHILD, server.url, str(folder), str(at)], capture_output=True, text=True
    )


def killed_at(points: list[int], folder: Path, finish: Any) -> None:
    for at in points:
        server = Server()
        server.finish = finish()
        first = child(server, folder / str(at), at)
        assert first.returncode == -signal.SIGKILL, f"point {at}: {first.stderr}"
        second = child(server, folder / str(at), 0)
        assert second.stdout.strip().endswith(str(WANTED)), f"point {at}: {second.stderr}"
        assert server.paid_lines == 7, f"point {at}: {server.paid}"
        server.close()


def points(folder: Path) -> int:
    server = Server()
    done = child(server, folder / "whole", 0)
    server.close()
    assert done.stdout, done.stderr
    return int(done.stdout.split()[0])


def test_kill_9_at_the_boundaries_of_a_batch_never_pays_twice(tmp_path: Path) -> None:
    total = points(tmp_path)
    assert total > 40
    killed_at(list(range(5, total, 7)), tmp_path, lambda: complete)


@pytest.mark.slow
def test_kill_9_at_every_boundary_never_pays_twice(tmp_path: Path) -> None:
    total = points(tmp_path)
    killed_at(list(range(1, total + 1)), tmp_path / "all", lambda: complete)
    killed_at(list(range(1, total + 1, 3)), tmp_path / "partial", lambda: expire("expired", 2))
