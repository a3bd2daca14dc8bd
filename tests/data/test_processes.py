"""Rows that several processes tokenize become what one process makes of them: tables, counts, errors."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tokens import byte_tokenizer

from posttrain.blocks.data import store
from posttrain.blocks.data.encoding import processes
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError

TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])


@pytest.fixture(autouse=True)
def few_rows_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH", 4)


def rows(count: int) -> list[dict[str, Any]]:
    """Rows of two schemas, some of which nothing can be made of."""
    found: list[dict[str, Any]] = [{"prompt": f"{n}?", "completion": "yes " * (n % 7), "tag": n} for n in range(count)]
    found[5:6] = [{"question": "why?", "answer": "so", "tag": 5, "spare": 1}]
    return found


def prepared(folder: Path, data: type[SFTData] = SFTData, **options: Any) -> Path:
    """Tokenize a file into a cache of its own; return the folder of the table."""
    cache = folder / f"cache-{options.get('num_proc')}"
    source = Source(name_or_path=str(folder / "rows.jsonl"))
    data(sources=[source], cache_dir=cache, invalid="drop", keep=["tag"], **options).prepare(TOKENIZER)
    (table,) = (found.parent for found in cache.glob("*/manifest.json"))
    return table


def write(folder: Path, found: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def test_a_table_is_the_same_to_the_byte_however_many_processes_make_it(tmp_path: Path) -> None:
    write(tmp_path, rows(50))
    one, two = prepared(tmp_path, num_proc=1), prepared(tmp_path, num_proc=2)
    assert one.name == two.name  # the number of processes is no part of what a table is
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {f.name: f.read_bytes() for f in two.iterdir()}
    manifest = json.loads((two / "manifest.json").read_text())
    assert sum(entry["count"] for entry in manifest["refused"].values()) == 8
    assert manifest["reading"]["unused"] == ["spare"]


class Picky(SFTData):
    """Fails on one row, or takes its process down."""

    def conversation(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["tag"] == 30:
            raise ZeroDivisionError("a slip in the code of a user")
        if row["tag"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        print("user code may print", flush=True)
        return super().conversation(row)


def test_an_error_in_a_process_is_raised_as_it_would_be_here(tmp_path: Path) -> None:
    write(tmp_path, rows(50))
    with pytest.raises(ZeroDivisionError, match="a slip in the code of a user") as raised:
        prepared(tmp_path, Picky, num_proc=2)
    assert "test_processes.py" in "".join(raised.value.__notes__)  # the line of the user
    assert not list(tmp_path.glob("cache-2/*/manifest.json"))


def test_a_process_that_is_killed_is_a_message(tmp_path: Path) -> None:
    write(tmp_path, [*rows(20), {"prompt": "?", "completion": "!", "tag": "die"}])
    with pytest.raises(DataError, match=r"rows.jsonl: a process that tokenizes was killed by signal 9 .*num_proc"):
        prepared(tmp_path, Picky, num_proc=1 + 1)


def test_a_class_that_no_other_process_can_have_is_refused_or_stays_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Local(SFTData):
        """Of a notebook, say."""

    write(tmp_path, rows(50))
    with pytest.raises(DataError, match=r"cannot be had in another process.*`code:`, or set data.num_proc to 1"):
        prepared(tmp_path, Local, num_proc=2)
    monkeypatch.setattr(processes, "PATIENCE", 0)
    monkeypatch.setattr(processes, "cores", lambda: 2)
    with caplog.at_level(logging.INFO, "posttrain"):
        assert json.loads((prepared(tmp_path, Local) / "manifest.json").read_text())["rows_in"] == 50
    assert "tokenizing in one process" in caplog.text
