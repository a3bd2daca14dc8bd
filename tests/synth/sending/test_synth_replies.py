"""What comes back is stored as it came, and exported whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from synth_server import Server, add, asked_by, chat, client, complete, output_line, raw, texts, written

from posttrain.errors import SynthError
from posttrain.synth import (
    Generate,
    Pipeline,
    Step,
)
from posttrain.synth.ledger import results


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


def test_a_dataset_of_nothing_is_empty(server: Server, tmp_path: Path) -> None:
    assert len(add(client(server, tmp_path), 2).to_dataset("t")) == 0


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
