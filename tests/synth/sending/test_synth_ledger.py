"""The ledger: damaged, full, and which requests are the same."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from synth_server import Server, add, chat, client, texts

from posttrain.errors import SynthError
from posttrain.synth import (
    Generate,
    Pipeline,
    VllmSynth,
)
from posttrain.synth.ledger.keys import CHAT, content_hash, sample_key


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
