"""What goes wrong with servers, keys, replies and files: each case was seen with an earlier version."""

import contextlib
import datetime
import errno
import json
import pickle
import shutil
import socket
import ssl
import threading
import time
import traceback
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from synth_server import Server, add, chat, complete, error, expire, nothing, output_line, raw, reset, texts, written

from posttrain.errors import DataError, SynthError
from posttrain.synth import (
    Compare,
    Filter,
    Generate,
    OpenAISynth,
    Pipeline,
    Price,
    Report,
    Step,
    TaskStopped,
    Verify,
    VllmSynth,
)
from posttrain.synth.ledger import results
from posttrain.synth.ledger.keys import CHAT, canonical, content_hash, sample_key
from posttrain.synth.pipelines.view import page
from posttrain.synth.sending import endpoints
from posttrain.synth.sending import online as engine
from posttrain.synth.sending.batches import calls
from posttrain.synth.steps.rows import items
from posttrain.synth.steps.verify import last_number

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(endpoints, "SHORTEST_EJECTION", 0.02)
    monkeypatch.setattr("posttrain.synth.sending.limits.FIRST_WAIT", 0.02)
    monkeypatch.setattr(calls, "FIRST_BACKOFF", 0.01)


def client(server: Server, folder: Path, **more: Any) -> OpenAISynth:
    given = {"mode": "online", "concurrency": 8, "poll_every": 0.01, "reconcile_after": 0.01, "api_key": KEY, **more}
    return OpenAISynth(base_url=server.url, work_dir=folder, **given)


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# -- keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "batch"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "  \n"])
def test_a_key_that_ends_in_a_line_break_works(server: Server, tmp_path: Path, mode: str, end: str) -> None:
    made = add(client(server, tmp_path, mode=mode, api_key=KEY + end), 2)
    assert len(texts(made.execute_batch_task("t"))) == 2
    assert {h.get("Authorization") for h in server.headers_seen} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("mode", ["online", "batch"])
@pytest.mark.parametrize(
    "wrong", [KEY + "\nexport X=1", KEY + " ", "\N{ZERO WIDTH SPACE}" + KEY, "schlüssel-1234", " \n"]
)
def test_a_key_that_no_header_can_hold_is_an_error_that_does_not_show_it(
    server: Server, tmp_path: Path, mode: str, wrong: str
) -> None:
    wrong = wrong if wrong != KEY + " " else f"{KEY} {KEY}"
    with pytest.raises(SynthError, match="the API key") as caught:
        add(client(server, tmp_path, mode=mode, api_key=wrong), 2).execute_batch_task("t")
    assert KEY not in shown(caught.value)
    assert "schlüssel" not in shown(caught.value)
    assert not server.calls


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_header_that_cannot_be_sent_is_an_error_that_shows_no_header(
    server: Server, tmp_path: Path, mode: str
) -> None:
    wrong = "-".join(("org", "of", "mine")) + "\nX: y"
    with pytest.raises(SynthError, match="header") as caught:
        add(client(server, tmp_path, mode=mode, organization=wrong), 2).execute_batch_task("t")
    assert "org-of-mine" not in shown(caught.value)
    assert KEY not in shown(caught.value)


@pytest.mark.parametrize("call", ["POST /files", "GET /files", "POST /batches", "GET /batches/ID"])
def test_a_server_that_repeats_the_key_in_an_error_of_batches_does_not_get_it_printed(
    server: Server, tmp_path: Path, call: str
) -> None:
    made = add(client(server, tmp_path, mode="batch"), 2)
    server.faults["POST /files"] = [error(500)]
    server.faults[call] = [*server.faults.get(call, [])[: call == "GET /files"], error(400, message=f"what is {KEY}?")]
    with pytest.raises(SynthError) as caught:
        made.execute_batch_task("t")
    assert "[secret]" in str(caught.value)
    assert KEY not in shown(caught.value)


# -- replies --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "batch"])
@pytest.mark.parametrize("key", ["ollama", "secret", "lm-studio", "not-needed", "choices", "content"])
def test_a_reply_that_holds_the_key_is_stored_as_it_came(server: Server, tmp_path: Path, mode: str, key: str) -> None:
    made = client(server, tmp_path, mode=mode, api_key=key)
    made.add_chat_to_batch_task("t", [{"role": "user", "content": f"is {key} a word?"}], model="m")
    assert texts(made.execute_batch_task("t")) == [f"re: is {key} a word?"]
    assert made.ledger.all("SELECT * FROM stray") == []
    made.to_jsonl("t", tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["messages"][-1]["content"] == f"re: is {key} a word?"


HALF = '{"choices": [{"index": 0, "message": {"role": "assistant", "content": "\\ud83d!"}, "finish_reason": "stop"}]}'


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_reply_with_half_a_character_is_asked_for_again(server: Server, tmp_path: Path, mode: str) -> None:
    made = add(client(server, tmp_path, mode=mode), 3)
    server.faults["POST /chat/completions"] = [raw(HALF.encode())]

    def halved(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        found = [output_line(lines[0], body=json.loads(HALF)), *map(output_line, lines[1:])]
        batch.update(status="completed", output_file_id=server.store(written(found)))
        server.finish = complete

    server.finish = halved
    assert texts(made.execute_batch_task("t")) == ["re: q0", "re: q1", "re: q2"]
    assert made.ledger.all("SELECT code FROM attempt") == [("not_unicode",)]


def test_half_a_character_in_an_older_ledger_harms_no_export_and_can_be_asked_again(
    server: Server, tmp_path: Path
) -> None:
    made = add(client(server, tmp_path), 3)
    made.execute_batch_task("t")
    with made.ledger.transaction() as db:
        db.execute("UPDATE response SET body = ? WHERE request = 2", (HALF.encode(),))
    assert made.to_jsonl("t", tmp_path / "a.jsonl") == made.to_parquet("t", tmp_path / "a.parquet") == 2
    assert [r["error"] and r["error"]["code"] for r in made.iter_responses("t")] == [None, "not_unicode", None]
    assert len(texts(made.execute_batch_task("t", retry_failed=True))) == 3
    assert server.paid == {"q0": 1, "q1": 2, "q2": 1}


def test_half_a_character_in_the_users_rows_is_kept_as_json_has_it(server: Server, tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r", "odd": "\ud83d"}
    Pipeline([Step()]).run([row], client(server, tmp_path), "p").export(tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == row


# -- rows that only harm themselves ---------------------------------------------------


def asked_by(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].removeprefix("q"))


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


# -- Parquet --------------------------------------------------------------------------


def written_and_read(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    from datasets import Dataset

    assert results.to_parquet(iter(rows), folder / "a.parquet") == len(rows)
    assert [p.name for p in folder.iterdir()] == ["a.parquet"]
    return list(Dataset.from_parquet(str(folder / "a.parquet"), keep_in_memory=True, cache_dir=str(folder / "c")))


def test_parquet_keeps_columns_that_the_first_rows_lack(tmp_path: Path) -> None:
    rows = [{"a": 1, "note": None}] * 1500 + [{"a": 2, "tools": [{"x": 1}], "note": "n"}]
    found = written_and_read(rows, tmp_path)
    assert found[0] == {"a": 1, "note": None, "tools": None}
    assert found[-1] == {"a": 2, "note": "n", "tools": '[{"x": 1}]'}


def test_parquet_keeps_fractions_behind_whole_numbers(tmp_path: Path) -> None:
    found = written_and_read([{"score": 4}] * 1200 + [{"score": 4.5}], tmp_path)
    assert (found[0]["score"], found[-1]["score"]) == (4.0, 4.5)


@pytest.mark.parametrize("rows", [[{"a": 1}, {"a": "one"}], [{"a": True}, {"a": 2}], [{"a": 2**70}], [{"a": "\ud83d"}]])
def test_what_no_column_of_parquet_keeps_is_an_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(SynthError, match=r"export (them )?as \.jsonl"):
        results.to_parquet(iter(rows), tmp_path / "a.parquet")
    assert not list(tmp_path.glob("*.rows"))


def test_what_is_kept_beside_some_requests_only_is_exported(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    for i in range(3):
        more = {"keep": {"place": i}, "tools": [{"type": "function"}]} if i else {}
        made.add_chat_to_batch_task("t", [{"role": "user", "content": f"q{i}"}], model="m", **more)
    made.execute_batch_task("t")
    assert [(row["place"], row["tools"] is None) for row in made.to_dataset("t")] == [
        (None, True), (1, False), (2, False),
    ]  # fmt: skip


# -- batches that are gone ------------------------------------------------------------


def test_a_batch_whose_output_is_gone_ends_and_is_sent_again_only_when_asked_to(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path, mode="batch"), 3)
    gone = error(404, message="no such file")
    server.faults["GET /files/ID/content"] = [gone] * 5
    for _ in range(2):
        responses = made.execute_batch_task("t", on_error="return")
        assert {r["error"]["code"] for r in responses} == {"output_file_gone"}
    assert server.calls["GET /files/ID/content"] == 5
    assert len(texts(made.execute_batch_task("t", retry_failed=True))) == 3


@pytest.mark.parametrize("status", ["cancelled", "Canceled"])
def test_a_batch_cancelled_at_the_provider_is_not_made_again_unasked(
    server: Server, tmp_path: Path, status: str
) -> None:
    made = add(client(server, tmp_path, mode="batch"), 5)
    server.finish = expire(status, 2)
    for _ in range(2):
        responses = made.execute_batch_task("t", on_error="return")
        assert [r["error"] and r["error"]["code"] for r in responses] == [None, None, *["batch_cancelled"] * 3]
    assert server.calls["POST /batches"] == 1
    assert len(texts(made.execute_batch_task("t", retry_failed=True))) == 5
    assert server.paid_lines == 5


def test_a_refused_batch_of_which_lines_were_paid_says_so(server: Server, tmp_path: Path) -> None:
    def finish(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        expire("failed", 2)(server, batch, lines)
        batch["errors"] = {"data": [{"code": "quota", "message": "over", "line": 3}]}

    server.finish = finish
    with pytest.raises(TaskStopped, match="2 of its lines were answered and are kept; fix it"):
        add(client(server, tmp_path, mode="batch"), 5).execute_batch_task("t")


# -- being told to wait, and outages --------------------------------------------------


@pytest.mark.parametrize("header", ["0", formatdate(time.time() - 50, usegmt=True)], ids=["0", "a date"])
def test_a_server_that_asks_for_no_wait_is_not_asked_in_a_hot_loop(
    server: Server, tmp_path: Path, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.synth.sending.limits.FIRST_WAIT", 0.2)
    server.answer = lambda body: (429, {})
    server.faults["POST /chat/completions"] = [error(429, "slow_down", retry_after=header)] * 1000
    with pytest.raises(TaskStopped, match="nothing else for"):
        add(client(server, tmp_path, concurrency=2, patience=0.5), 50).execute_batch_task("t")
    assert server.calls["POST /chat/completions"] < 20
    batch = add(client(server, tmp_path / "b", mode="batch", patience=0.2), 2)
    server.faults["GET /batches/ID"] = [error(429, "slow_down", retry_after=header)] * 30
    with pytest.raises(TaskStopped):
        batch.execute_batch_task("t")
    assert 8 < server.calls["GET /batches/ID"] < 20


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("call", ["POST /chat/completions", "GET /batches/ID"])
def test_a_wait_longer_than_patience_stops_the_task(server: Server, tmp_path: Path, status: int, call: str) -> None:
    mode = "online" if "chat" in call else "batch"
    made = add(client(server, tmp_path, mode=mode), 3)
    server.faults[call] = [error(status, "slow_down", retry_after="86400")] * (3 if mode == "online" else 1)
    with pytest.raises(TaskStopped, match=r"asks to wait 86,400 s.*patience"):
        made.execute_batch_task("t")
    assert len(texts(made.execute_batch_task("t"))) == 3


def test_a_5xx_is_asked_again_when_it_says(server: Server, tmp_path: Path) -> None:
    seen: list[float] = []
    faults = [error(500, retry_after="0.4")]
    server.faults["POST /chat/completions"] = [
        lambda handler: bool(seen.append(time.monotonic())) or (bool(faults) and faults.pop()(handler))
    ] * 2
    add(client(server, tmp_path, concurrency=1), 1).execute_batch_task("t")
    assert seen[1] - seen[0] >= 0.4


@pytest.mark.parametrize(
    ("lanes", "kind"),
    [
        (1, "503"),
        (8, "reset"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "reset"), (1, "502"), (8, "503"), (8, "502")]),
    ],
)
def test_an_outage_pauses_the_server_and_burns_no_row(server: Server, tmp_path: Path, kind: str, lanes: int) -> None:
    made = add(client(server, tmp_path, concurrency=lanes, attempts=4), 60)
    fault = reset if kind == "reset" else error(int(kind))
    server.faults["POST /chat/completions"] = [nothing] * 10 + [fault] * 24
    responses = made.execute_batch_task("t", on_error="return")
    burnt = sum(r["error"] is not None for r in responses)
    assert burnt <= (2 if lanes == 1 else 0)
    assert set(server.paid.values()) == {1}


def test_a_server_that_stays_ill_stops_the_task_and_one_row_that_always_fails_does_not(
    server: Server, tmp_path: Path
) -> None:
    server.answer = lambda body: (503, {"error": {"message": "ill"}}) if asked_by(body) == 2 else (200, chat(body))
    made = add(client(server, tmp_path, attempts=3), 9)
    responses = made.execute_batch_task("t", on_error="return")
    assert [i for i, r in enumerate(responses) if r["error"]] == [2]
    server.answer = lambda body: (503, {"error": {"message": "ill"}})
    other = add(client(server, tmp_path / "b", patience=0.3), 50)
    with pytest.raises(TaskStopped, match="no_server: no answers from http.*HTTP 503"):
        other.execute_batch_task("t")
    assert other.status("t").failed == 0


# -- pipelines that stop, and what cannot be ------------------------------------------


class Full:
    """A disk that is full for some files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = open

        class Stuck:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, text: str) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                self.file.close()

        def opened(path: Any, *given: Any, **more: Any) -> Any:
            return Stuck(real(path, *given, **more)) if name in str(path) else real(path, *given, **more)

        monkeypatch.setattr(results, "open", opened, raising=False)


def test_a_stopped_pipeline_shows_and_exports_nothing_of_the_run_before(server: Server, tmp_path: Path) -> None:
    steps = Pipeline([Generate(model="m"), Filter(column="finish_reason", equals="stop")])
    made = client(server, tmp_path, concurrency=1)
    steps.run([{"prompt": f"q{i}"} for i in range(3)], made, "p")
    assert len(list(Report.load(tmp_path / "p").rows())) == 3
    server.faults["POST /chat/completions"] = [error(401, message="expired")]
    with pytest.raises(TaskStopped):
        steps.run([{"prompt": f"other {i}"} for i in range(5)], made, "p")
    left = Report.load(tmp_path / "p")
    with pytest.raises(SynthError, match=r"step 1 \(generate\) was stopped: .*expired"):
        left.rows()
    assert [(stage.name, stage.rows_out) for stage in left.stages] == [("source", 5), ("generate", 0)]
    assert "Not finished" in page(left)
    assert "re: q" not in page(left)


def test_a_killed_pipeline_leaves_no_report_of_the_run_before(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    Pipeline([Step()]).run([{"prompt": "a"}], made, "p")

    class Killed(BaseException):
        pass

    class Kills(Step):
        def fold(self, row: Any, replies: Any) -> Any:
            (tmp_path / "seen").write_text((tmp_path / "p" / "report.json").read_text())
            return [row]

    Pipeline([Kills()]).run([{"prompt": "a"}], made, "p")
    assert "is running, or was stopped" in json.loads((tmp_path / "seen").read_text())["unfinished"]


def test_a_full_disk_stops_a_pipeline_with_a_message(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        Full(full, "1-generate")
        with pytest.raises(SynthError, match=r"1-generate\S* cannot be written: No space left on device"):
            Pipeline([Generate(model="m")]).run([{"prompt": "q1"}], client(server, tmp_path), "p")
    report = Pipeline([Generate(model="m")]).run([{"prompt": "q1"}], client(server, tmp_path), "p")
    assert len(list(report.rows())) == 1
    assert server.paid_lines == 1


def test_a_file_that_a_step_misses_is_not_called_a_full_disk(server: Server, tmp_path: Path) -> None:
    def missing(row: Any) -> bool:
        return bool(Path("/no/such/file").read_text())

    with pytest.raises(FileNotFoundError):
        Pipeline([Filter(function=missing)]).run([{"prompt": "q1"}], client(server, tmp_path), "p")


NOON = datetime.datetime(2026, 11, 26, 12)


@pytest.mark.parametrize(
    ("step", "row", "said"),
    [
        (Compare(model="j"), {"prompt": "p", "rejected": "x"}, r":1: there is no column 'chosen'"),
        (Filter(column="response", least=3), {"prompt": "p", "response": "x"}, r":1: column 'response' holds text"),
        (Verify(function="json_schema", wanted="form"), {"prompt": "p", "response": "{}", "form": '{"type": 3}'},
         r":1: not a valid JSON schema"),
        (Step(), {"prompt": "p", "at": NOON}, r"row 1: column 'at' holds a datetime"),
        (Step(), {"prompt": "p", "picture": {"bytes": [b"x"]}}, r"row 1: column 'picture' holds a bytes"),
        (Step(), {"prompt": "p", "odd": {(1, 2): 3}}, r"row 1: column 'odd' holds a tuple"),
        (Step(), "text", r"row 1: a row is an object of columns, not a str"),
    ],
)  # fmt: skip
def test_what_a_step_cannot_work_with_is_said_with_the_row(
    server: Server, tmp_path: Path, step: Step, row: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        Pipeline([step]).run([row], client(server, tmp_path), "p")


def test_a_check_that_raises_drops_its_row_and_is_counted(server: Server, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": text} for text in ("1", "x", "3")]
    report = Pipeline([Verify(function=lambda answer, row: int(answer) > 2)]).run(rows, client(server, tmp_path), "p")
    assert [row["score"] for row in report.rows()] == [0, 1]
    assert report.stages[1].dropped == {"the check raised ValueError": 1}


def test_a_schema_that_is_none_is_said_before_anything_is_sent() -> None:
    ((name, message),) = Verify(function="json_schema", options={"schema": {"type": "strin"}}).check()
    assert (name, "not a valid JSON schema" in message) == ("options", True)


def test_nan_does_not_pass_a_filter(server: Server, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "score": float("nan")}, {"prompt": "q", "score": 4}]
    report = Pipeline([Filter(least=3)]).run(rows, client(server, tmp_path), "p")
    assert [row["prompt"] for row in report.rows()] == ["q"]
    assert report.stages[1].dropped == {"score is not a number (NaN)": 1}


@pytest.mark.parametrize("damage", ["head", "middle"])
def test_a_damaged_ledger_is_said_and_locks_nobody_out(server: Server, tmp_path: Path, damage: str) -> None:
    made = add(client(server, tmp_path), 60)
    made.execute_batch_task("t")
    made.ledger.one("PRAGMA wal_checkpoint(TRUNCATE)")
    made.ledger.close()
    file = tmp_path / "ledger.sqlite"
    content = file.read_bytes()
    broken = b"\x7f" * 4096 + content[4096:] if damage == "head" else content[:4096] + b"\x7f" * (len(content) - 4096)
    file.write_bytes(broken)
    for _ in range(2):
        with pytest.raises(SynthError, match=r"cannot be (read|written).*(damaged|malformed|not a database)"):
            list(client(server, tmp_path).iter_responses("t"))
    file.write_bytes(content)
    assert len(list(client(server, tmp_path).iter_responses("t"))) == 60


def test_a_folder_that_is_full_at_first_does_not_lock_its_own_process_out(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("posttrain.synth.ledger.database.os.pwrite", full)
        with pytest.raises(SynthError, match="No space left on device"):
            add(client(server, tmp_path), 1)
    with monkeypatch.context() as broken:
        broken.setattr("posttrain.synth.ledger.store.Ledger._prepare", full)
        with pytest.raises(OSError, match="No space left"):
            add(client(server, tmp_path), 1)
    assert len(texts(add(client(server, tmp_path), 1).execute_batch_task("t"))) == 1


def test_a_dataset_of_nothing_is_empty(server: Server, tmp_path: Path) -> None:
    assert len(add(client(server, tmp_path), 2).to_dataset("t")) == 0


# -- what answers ---------------------------------------------------------------------


def test_another_server_or_other_weights_under_the_same_name_answer_anew(server: Server, tmp_path: Path) -> None:
    other = Server()
    first = add(VllmSynth(base_url=server.url, work_dir=tmp_path), 2)
    first.execute_batch_task("t")
    add(VllmSynth(base_url=other.url, work_dir=tmp_path), 2).execute_batch_task("t")
    assert (server.paid_lines, other.paid_lines) == (2, 2)
    for weights, urls, paid in (("step-1", server.url, 4), ("step-1", [other.url], 4), ("step-2", other.url, 6)):
        add(VllmSynth(base_url=urls, weights=weights, work_dir=tmp_path), 2).execute_batch_task("t")
        assert server.paid_lines + other.paid_lines - 2 == paid
    hosted = [add(client(server, tmp_path, weights=weights), 2) for weights in (None, "2026-01", "2026-01")]
    before = server.paid_lines
    for made in hosted:
        made.execute_batch_task("t")
    assert server.paid_lines - before == 4
    other.close()


def test_an_engine_answers_anew_when_its_weights_or_their_revision_change(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    seen = {VllmSynth(model_params={"model": str(folder), **more}).namespace for more in ({}, {"revision": "b"})}
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    seen.add(VllmSynth(model_params={"model": str(folder)}).namespace)
    assert len(seen) == 3
    assert VllmSynth(model_params={"model": str(folder), "gpu_memory_utilization": 0.5}).namespace in seen


# -- bounds ---------------------------------------------------------------------------


def costly(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A reply that uses all that it may, to a prompt of a token a byte."""
    used = {"prompt_tokens": len(canonical(body)), "completion_tokens": body["max_tokens"]}
    return 200, {**chat(body), "usage": used}


def test_the_cost_of_a_task_never_passes_its_bound(server: Server, tmp_path: Path) -> None:
    server.answer, server.delay = costly, 0.005
    made = client(server, tmp_path, concurrency=16, prices={"m": Price(input=10_000, output=1000)})
    for i in range(60):
        made.add_chat_to_batch_task("t", [{"role": "user", "content": f"q{i} " + "字" * 100}], model="m", max_tokens=20)
    bound = made.plan("t").cost
    with pytest.raises(TaskStopped, match="could pass max_cost"):
        made.execute_batch_task("t", max_cost=bound)
    status = made.status("t")
    assert bound / 2 < status.cost <= bound
    assert status.done > 2


def test_requests_wait_for_others_before_a_bound_stops_them(server: Server, tmp_path: Path) -> None:
    server.delay = 0.01
    made = add(client(server, tmp_path, prices={"m": Price(input=1, output=1000)}), 40, max_tokens=100)
    made.execute_batch_task(
        "t", max_cost=made.plan("t").cost
    )  # 40 at their ceiling would pass it; they use a twentieth
    assert made.status("t").done == 40


def test_a_cost_that_nothing_bounds_is_said_before_anything_is_sent(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path, prices={"m": Price(input=1, output=1)}), 3)
    with pytest.raises(TaskStopped, match="3 requests set no max_tokens.*nothing was sent"):
        made.execute_batch_task("t", max_cost=5)
    assert server.paid_lines == 0


def test_what_is_in_batches_counts_against_the_bound(server: Server, tmp_path: Path) -> None:
    server.finish = lambda *batch: None
    made = add(client(server, tmp_path, mode="batch", prices={"m": Price(input=1, output=1000)}), 7, max_tokens=100)
    bound = made.plan("t").cost * 1.5
    made.execute_batch_task("t", wait=False, max_cost=bound)
    for i in range(7):
        made.add_chat_to_batch_task("t", [{"role": "user", "content": f"more{i}"}], model="m", max_tokens=100)
    with pytest.raises(TaskStopped, match="under way.*passes max_cost"):
        made.execute_batch_task("t", wait=False, max_cost=bound)
    assert server.calls["POST /batches"] == 1
    server.finish = complete
    made.execute_batch_task("t", max_cost=bound * 2)
    assert server.paid_lines == 14


def test_answers_that_did_not_come_in_time_may_have_been_charged(server: Server, tmp_path: Path) -> None:
    gone = threading.Event()
    server.faults["POST /chat/completions"] = [lambda handler: gone.wait(20)] * 3
    price = {"m": Price(input=0, output=1000)}
    made = add(client(server, tmp_path, concurrency=1, timeout=0.1, prices=price), 1, max_tokens=100)
    with pytest.raises(TaskStopped, match=r"\$0.2000 may have been charged for answers that did not come"):
        made.execute_batch_task("t", max_cost=0.25)
    gone.set()


def test_an_image_counts_as_an_image_and_not_as_its_bytes(server: Server, tmp_path: Path) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    made = client(server, tmp_path)
    made.add_chat_to_batch_task("t", [{"role": "user", "content": [{"type": "text", "text": "x"}, picture]}], model="m")
    assert 1500 <= made.plan("t").input_tokens < 1600


def test_tokens_per_minute_that_were_not_used_are_given_back(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path, concurrency=2, tpm=3000), 40)  # 1,024 each are reserved, and 15 are used
    done = threading.Event()
    worker = threading.Thread(target=lambda: (made.execute_batch_task("t"), done.set()), daemon=True)
    worker.start()
    assert done.wait(20)


# -- small things ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "items_wanted"),
    [
        ("1. Sing [1]\n2. Dance [2]", ["Sing [1]", "Dance [2]"]),
        ("See [1].\n- one\n- two", ["one", "two"]),
        ('Here you are [1]: ["a", "b"]', ["a", "b"]),
        ('```json\n["a", {"b": 1}]\n```', ["a", '{"b": 1}']),
        ('["a [x]", "b"]', ["a [x]", "b"]),
        ("[1] is no list", []),
    ],
)
def test_a_list_is_told_from_a_reference(text: str, items_wanted: list[str]) -> None:
    assert items(text) == items_wanted


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1/2", 0.5), ("so x = 3 / 4.", 0.75), ("1e3", 1000), ("2.5E-2", 0.025), ("\N{MINUS SIGN}5", -5), ("-5", -5),
        ("it is \N{MINUS SIGN}$1,200.50.", -1200.5), ("10-4", 4), ("(1,2)", 2), ("1,234", 1234), ("+7", 7), ("x2 = 3", 3),
        ("no number", None), ("1/0", 0),
    ],
)  # fmt: skip
def test_the_last_number_is_read_as_people_write_it(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_a_refusal_is_no_empty_answer(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refused(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        made = chat(body)
        if asked_by(body) == 1:
            made["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I must not."}
        return 200, made

    server.answer = refused
    made = add(client(server, tmp_path), 3)
    made.execute_batch_task("t")
    assert [row["messages"][-1]["content"] for row in made.iter_rows("t")] == ["re: q0", "re: q2"]
    assert "1 replies without text" in caplog.text
    report = Pipeline([Generate(model="m")]).run([{"prompt": f"q{i}"} for i in range(3)], made, "p")
    assert report.stages[1].dropped == {"the model refused": 1}
    assert next(report.dropped())["dropped"]["detail"] == "I must not."


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_host_that_does_not_exist_is_said_at_once(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*given: Any, **more: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    made = OpenAISynth(base_url="http://api.example/v1", api_key=KEY, mode=mode, work_dir=tmp_path, patience=60)
    with pytest.raises(TaskStopped, match="Name or service not known"):
        add(made, 3).execute_batch_task("t")


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_certificate_that_nobody_trusts_is_said_at_once(tmp_path: Path, mode: str) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with contextlib.suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}/v1"
        made = OpenAISynth(base_url=url, api_key=KEY, mode=mode, work_dir=tmp_path / "w", patience=60, concurrency=1)
        with pytest.raises(TaskStopped, match="CERTIFICATE_VERIFY_FAILED"):
            add(made, 1).execute_batch_task("t")


def self_signed(folder: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    certificate, file = folder / "c.pem", folder / "k.pem"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return certificate, file


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_servers_get_to_know_who_asks(server: Server, tmp_path: Path, mode: str) -> None:
    add(client(server, tmp_path, mode=mode), 1).execute_batch_task("t")
    agents = {{name.lower(): value for name, value in h.items()}["user-agent"] for h in server.headers_seen}
    assert len(agents) == 1
    assert agents.pop().startswith("posttrain")


def test_the_order_of_keywords_pays_for_nothing_again(server: Server, tmp_path: Path) -> None:
    made = client(server, tmp_path)
    question = [{"role": "user", "content": "q"}]
    made.add_chat_to_batch_task("a", question, model="m", top_p=1, max_tokens=5)
    made.execute_batch_task("a")
    made.add_chat_to_batch_task("b", question, model="m", max_tokens=5, top_p=1)
    made.execute_batch_task("b")
    assert server.paid_lines == 1
    body = json.dumps({"model": "m", "messages": question, "top_p": 1, "max_tokens": 6}, separators=(",", ":")).encode()
    older = sample_key(content_hash(made.namespace, CHAT, body), 0)  # as version 0.1 has written it
    with made.ledger.transaction() as db:
        db.execute("INSERT INTO request VALUES (99, ?, ?, 'm', ?, 1, 6)", (older, CHAT, body))
        db.execute(
            "INSERT INTO response VALUES (99, 0, NULL, ?, 1, 1, 0, NULL, 'stop')",
            (json.dumps(chat(json.loads(body))).encode(),),
        )
    step = Generate(model="m", body={"top_p": 1, "max_tokens": 6})
    assert len(list(Pipeline([step]).run([{"prompt": "q"}], made, "p").rows())) == 1
    assert server.paid_lines == 1


def test_a_client_can_be_sent_to_another_process_and_its_key_stays(server: Server, tmp_path: Path) -> None:
    made = add(client(server, tmp_path), 1)
    made.execute_batch_task("t")
    packed = pickle.dumps(made)
    assert KEY.encode() not in packed
    made.ledger.close()
    again = pickle.loads(packed)
    assert len(texts(add(again, 1).execute_batch_task("t"))) == 1
    with pytest.raises(SynthError, match="stays in its process"):
        add(again, 2).execute_batch_task("t")


def test_nobody_waits_for_ever_for_what_is_in_batches(server: Server, tmp_path: Path) -> None:
    price = {"m": Price(input=1000, output=0)}
    server.finish = lambda *batch: None
    add(client(server, tmp_path, mode="batch", prices=price), 3, max_tokens=9).execute_batch_task("t", wait=False)
    made = add(client(server, tmp_path, prices=price), 4, max_tokens=9)
    plan = made.plan("t")
    assert (plan.waiting, plan.new) == (3, 1)
    with pytest.raises(TaskStopped, match="could pass max_cost"):
        made.execute_batch_task("t", max_cost=plan.cost + plan.under_way)
    made.run("t", max_cost=5)
    assert made.status("t").done == 1


def test_a_server_is_back_for_all_although_old_requests_hang(server: Server, tmp_path: Path) -> None:
    hanging = threading.Event()
    server.faults["POST /chat/completions"] = [lambda handler: hanging.wait(30)] * 2 + [error(503)] * 4
    made = add(client(server, tmp_path, concurrency=6, timeout=20), 40)
    worker = threading.Thread(target=lambda: made.execute_batch_task("t"), daemon=True)
    worker.start()
    deadline = time.monotonic() + 15
    while made.status("t").done < 38 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert made.status("t").done >= 38
    hanging.set()
    worker.join(30)
