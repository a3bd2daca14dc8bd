"""What goes wrong with servers, keys, replies and files: each case was seen with an earlier version."""

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
from synth_server import Server, add, error, texts

from posttrain.errors import SynthError
from posttrain.synth import OpenAISynth
from posttrain.synth.sending import batch_api
from posttrain.synth.sending import online as engine

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(engine, "SHORTEST_EJECTION", 0.02)
    monkeypatch.setattr("posttrain.synth.sending.limits.FIRST_WAIT", 0.02)
    monkeypatch.setattr(batch_api, "FIRST_BACKOFF", 0.01)


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
