"""A server that is gone: for good, for a while, or one of several."""

import io
import logging
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from synth_server import Server, add, client, dies, nothing, texts

from posttrain.synth import TaskStopped, VllmSynth
from posttrain.synth.ledger.live import shown
from posttrain.synth.ledger.session import Progress
from posttrain.synth.sending import silence

WANTED = [f"re: q{i}" for i in range(30)]
MOMENTS = [
    ("online", "POST /chat/completions", 12), ("batch", "POST /files", 0), ("batch", "POST /batches", 0),
    ("batch", "GET /batches/ID", 0), ("batch", "GET /files/ID/content", 0),
]  # fmt: skip
"""(mode, what the server is asked when it dies, how often it has answered that before)."""
SINCE = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(.+\)"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a terminal shows."""
    shown = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    return [text for text in shown if "reply to a call" not in text]


@pytest.mark.parametrize(("mode", "call", "after"), MOMENTS, ids=[call for _, call, _ in MOMENTS])
def test_a_server_that_is_gone_for_good_ends_the_run_and_the_same_command_goes_on(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, call: str, after: int
) -> None:
    server.faults[call] = [nothing] * after + [dies]
    made = add(client(server, tmp_path, mode=mode, patience=0.3), 30)
    with pytest.raises(TaskStopped) as stopped:
        made.execute_batch_task("t")
    status = made.status("t")
    kept = re.escape(f"patience is 0.3 s. {status.done} of 30 results are kept in {tmp_path / 'ledger.sqlite'}; ")
    assert re.search(
        rf"no answers from {server.url} {SINCE}; {kept}when a server is back, run the same", str(stopped.value)
    )
    (line,) = said(caplog)
    assert re.fullmatch(
        rf"no answers from {server.url} {SINCE}; it is tried until \d\d:\d\d:\d\d \(patience: 0.3 s\)", line
    )
    assert (status.failed, status.done == 0) == (0, mode == "batch")
    server.back()
    assert texts(made.execute_batch_task("t")) == WANTED
    assert set(server.paid.values()) == {1}


@pytest.mark.parametrize(("mode", "call", "after"), MOMENTS, ids=[call for _, call, _ in MOMENTS])
def test_a_server_that_comes_back_in_time_loses_nothing(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, call: str, after: int,
) -> None:  # fmt: skip
    class Reviver(logging.Handler):
        """Starts the server when it is missed."""

        def emit(self, record: logging.LogRecord) -> None:
            if "no answers" in record.getMessage():
                server.back()

    server.faults[call] = [nothing] * after + [dies]
    silence.log.addHandler(reviver := Reviver())
    try:
        assert texts(add(client(server, tmp_path, mode=mode), 30).execute_batch_task("t")) == WANTED
    finally:
        silence.log.removeHandler(reviver)
    assert set(server.paid.values()) == {1}
    gone, back = said(caplog)
    assert (gone.startswith("no answers from"), back) == (True, f"{server.url} answers again")


def test_of_several_servers_one_that_is_gone_is_said_once_and_the_others_go_on(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Server()
    other.faults["POST /chat/completions"] = [dies]
    urls = [given.url.removesuffix("/v1") for given in (server, other)]
    made = add(VllmSynth(base_url=urls, work_dir=tmp_path, concurrency=8), 30)
    assert texts(made.execute_batch_task("t")) == WANTED
    (line,) = said(caplog)
    assert re.fullmatch(rf"no answers from {urls[1]} {SINCE}; the other servers go on", line)
    server.faults["POST /chat/completions"] = [dies]
    made = add(VllmSynth(base_url=urls, work_dir=tmp_path / "b", concurrency=8, patience=0.3), 30)
    with pytest.raises(
        TaskStopped, match=f"no answers from {urls[0]} .*; no answers from {urls[1]} .*; patience is 0.3 s"
    ):
        made.execute_batch_task("t")


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_name_that_is_not_found_any_more_is_waited_for(tmp_path: Path, server: Server, mode: str) -> None:
    """One that was never found is not: see `test_a_host_that_does_not_exist_is_said_at_once`."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if len(asked) > 1:
            raise httpx.ConnectError("not found") from socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        message = {"role": "assistant", "content": "yes"}
        return httpx.Response(200, json={"id": "file-0", "choices": [{"message": message, "finish_reason": "stop"}]})

    made = client(server, tmp_path, mode=mode, patience=0.2, concurrency=1, transport=httpx.MockTransport(answer))
    with pytest.raises(TaskStopped, match="no answers from .*not found.*; patience is 0.2 s"):
        add(made, 3).execute_batch_task("t")
    assert len(asked) > 2


def test_patience_is_measured_from_the_first_answer_that_failed_to_come(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(silence.time, "monotonic", lambda: now[0])
    found = silence.Silence("http://a/v1/", 300)
    assert (found.left, found.reached) == (300, False)
    found.goes_on("refused")
    now[0] += 200
    found.goes_on("reset")
    assert (found.left, found.why, len(said(caplog))) == (100, "reset", 1)
    now[0] += 200
    assert found.left == 0
    found.ends(999)  # what was on its way before
    assert found.left == 0
    found.ends(1300)
    assert (found.left, found.reached, said(caplog)[-1]) == (300, True, "http://a/v1 answers again")


def test_what_is_logged_stands_above_the_line_that_shows_how_a_run_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    screen, real = io.StringIO(), rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **given: real(file=screen, force_terminal=True, width=80))
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    before = handler.stream
    try:
        with shown() as report:
            report(Progress(total=9, done=4))
            logging.getLogger("posttrain.synth").warning("no answers")
    finally:
        logging.getLogger().removeHandler(handler)
    assert re.search(r"\x1b\[2Kno answers", screen.getvalue())
    assert handler.stream is before


@pytest.mark.slow
def test_the_command_line_shows_the_line_once_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"client: {{type: openai, mode: online, base_url: '{url}', patience: 0.3, work_dir: {tmp_path}/w}}\n"
        f"source: {tmp_path}/rows.jsonl\nsteps: [{{type: generate, model: m}}]\noutput: {tmp_path}/out.jsonl\n"
    )
    command = [sys.executable, "-m", "posttrain.cli", "synth", "run", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env={"OPENAI_API_KEY": "k", "PATH": "/usr/bin"})
    assert done.returncode == 1
    assert done.stderr.count("it is tried until") == 1
    assert re.search(
        rf"error: .*no answers from {url} {SINCE}; patience is 0.3 s. 0 of 1 results are kept", done.stderr
    )
