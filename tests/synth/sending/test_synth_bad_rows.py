"""Rows that are refused harm only themselves, and a task that is wrong as a whole stops early."""

from pathlib import Path

import pytest
from synth_server import Server, add, asked_by, chat, client, texts

from posttrain.synth import (
    TaskStopped,
)
from posttrain.synth.sending import online as engine


def test_one_row_that_is_forbidden_fails_alone(server: Server, tmp_path: Path) -> None:
    server.answer = lambda body: (
        (403, {"error": {"message": "moderated"}}) if asked_by(body) == 2 else (200, chat(body))
    )
    responses = add(client(server, tmp_path, concurrency=1), 30).execute_batch_task("t", on_error="return")
    assert [r["error"]["code"] for r in responses if r["error"]] == ["http_403"]
    assert server.paid_lines == 29


def test_a_key_that_loses_its_rights_stops_the_task_and_the_next_run_sends_everything(
    server: Server, tmp_path: Path
) -> None:
    server.answer = lambda body: (403, {"error": {"message": "no"}}) if asked_by(body) > 5 else (200, chat(body))
    made = add(client(server, tmp_path, concurrency=1), 90)
    with pytest.raises(TaskStopped, match="from all over the task"):
        made.execute_batch_task("t")
    assert server.calls["POST /chat/completions"] < 6 + 20 + 6
    server.answer = lambda body: (200, chat(body))
    assert len(texts(made.execute_batch_task("t"))) == 90


@pytest.mark.parametrize("status", [400, 404])
def test_bad_rows_at_the_head_cost_only_themselves(server: Server, tmp_path: Path, status: int) -> None:
    server.answer = lambda body: (status, {"error": {"message": "x"}}) if asked_by(body) < 40 else (200, chat(body))
    responses = add(client(server, tmp_path, concurrency=2), 90).execute_batch_task("t", on_error="return")
    assert [r["error"] is not None for r in responses] == [i < 40 for i in range(90)]
    assert server.calls["POST /chat/completions"] == 90
    assert set(server.paid.values()) == {1}


def test_a_task_that_is_wrong_as_a_whole_stops_early_and_no_run_asks_the_same_rows_again(
    server: Server, tmp_path: Path
) -> None:
    server.answer = lambda body: (400, {"error": {"message": "no such field", "code": "bad"}})
    made = add(client(server, tmp_path, concurrency=1), 200)
    for calls in (23, 46):
        with pytest.raises(TaskStopped, match="retry_failed=True"):
            made.execute_batch_task("t")
        assert server.calls["POST /chat/completions"] == calls
    server.answer = lambda body: (200, chat(body))
    assert len(texts(made.execute_batch_task("t", retry_failed=True))) == 200


def test_a_request_that_is_larger_than_a_minutes_worth_fails_alone(server: Server, tmp_path: Path) -> None:
    large = {"message": "Request too large for m (TPM): Limit 30000, Requested 35016.", "code": "rate_limit_exceeded"}
    server.answer = lambda body: (429, {"error": large}) if asked_by(body) == 2 else (200, chat(body))
    seen: list[int] = []
    made = add(client(server, tmp_path, concurrency=1), 9)
    responses = made.execute_batch_task("t", on_error="return", progress=lambda p: seen.append(p.storms))
    assert [r["error"]["code"] for r in responses if r["error"]] == ["request_too_large"]
    assert server.calls["POST /chat/completions"] == 9
    assert seen[-1] == 0


def test_a_row_that_is_told_to_wait_while_others_are_answered_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WAITS", 4)
    server.answer = lambda body: (429, {"error": {"message": "no"}}) if asked_by(body) == 2 else (200, chat(body))
    made = add(client(server, tmp_path, concurrency=2, patience=20), 400)
    responses = made.execute_batch_task("t", on_error="return")
    assert [i for i, r in enumerate(responses) if r["error"]] == [2]
    assert "told to wait 4 times" in responses[2]["error"]["message"]
