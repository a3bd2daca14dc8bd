"""Servers that are ill, that say wait, or that have lost a batch."""

import contextlib
import datetime
import socket
import ssl
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from synth_server import (
    KEY,
    Server,
    add,
    asked_by,
    chat,
    client,
    error,
    expire,
    nothing,
    reset,
    texts,
)

from posttrain.synth import OpenAISynth, TaskStopped
from posttrain.synth.sending import online


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
def test_an_outage_pauses_the_server_and_burns_no_row(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lanes: int
) -> None:
    monkeypatch.setattr(online, "FIRST_BACKOFF", 0.3)  # so that others meet it before one row has used up its attempts
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


def test_a_server_is_back_for_all_although_old_requests_hang(server: Server, tmp_path: Path) -> None:
    hanging = threading.Event()
    server.faults["POST /chat/completions"] = [lambda handler: not hanging.wait(30)] * 2 + [error(503)] * 4
    made = add(client(server, tmp_path, concurrency=6, timeout=20), 40)
    worker = threading.Thread(target=lambda: made.execute_batch_task("t"), daemon=True)
    worker.start()
    deadline = time.monotonic() + 15
    while made.status("t").done < 38 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert made.status("t").done >= 38
    hanging.set()
    worker.join(30)
