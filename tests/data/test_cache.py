"""The cache of tokenized rows: used again, shared, and never taken for whole when it is not."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from small_data import SCHEMAS, TOKENIZER, data, replies, write
from tokens import byte_tokenizer

from posttrain.blocks.data import hashes, store
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    built: list[int] = []
    original = store.build

    def build(*args: Any) -> None:
        built.append(1)
        original(*args)

    monkeypatch.setattr(store, "build", build)
    return built


def test_the_cache_is_used_again_and_notices_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = counting(monkeypatch)
    path = write(tmp_path / "a.jsonl", SCHEMAS["alpaca"], SCHEMAS["alpaca"])
    for _ in range(2):
        data(path).prepare(TOKENIZER)
    assert len(built) == 1
    data(path, max_length=99, overflow="drop", packing=False).prepare(TOKENIZER)  # views, not tokens
    assert len(built) == 1
    stamp = path.stat().st_mtime_ns
    write(path, SCHEMAS["alpaca"], {**SCHEMAS["alpaca"], "output": "b"})
    os.utime(path, ns=(stamp, stamp))  # not even the clock tells
    assert replies(data(path).prepare(TOKENIZER).train) == ["a", "b"]
    assert len(built) == 2
    data(path, train_on=["user", "assistant"]).prepare(TOKENIZER)
    assert len(built) == 3
    data(path).prepare(byte_tokenizer(TEMPLATES["chatml"].replace("assistant", "helper")))
    assert len(built) == 4

    class Shouting(SFTData):
        def conversation(self, row: dict[str, Any]) -> dict[str, Any]:
            return super().conversation({**row, "output": row["output"].upper()})

    assert replies(Shouting(sources=[Source(name_or_path=str(path))]).prepare(TOKENIZER).train) == ["A", "B"]


def aged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock go on, so that a file is old enough for its hash to be remembered."""
    ahead = max(path.stat().st_ctime, path.stat().st_mtime) + 10
    monkeypatch.setattr(time, "time", lambda: ahead)


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    original = hashes._hashed
    monkeypatch.setattr(hashes, "_hashed", lambda path: hashed.append(path) or original(path))
    path = write(tmp_path / "a.jsonl", SCHEMAS["alpaca"])
    data(path).prepare(TOKENIZER)
    data(path).prepare(TOKENIZER)
    assert len(hashed) == 2  # it may have changed within the grain of the clock
    aged(path, monkeypatch)
    data(path).prepare(TOKENIZER)
    data(path).prepare(TOKENIZER)
    assert len(hashed) == 3
    stamp = path.stat().st_mtime_ns
    write(path, {**SCHEMAS["alpaca"], "output": "b"})
    os.utime(path, ns=(stamp, stamp))  # same size, same date
    aged(path, monkeypatch)
    assert replies(data(path).prepare(TOKENIZER).train) == ["b"]
    assert len(hashed) == 4
    for note in (tmp_path / "cache" / "hashes").glob("*.json"):
        note.write_text("[]")
    assert replies(data(path).prepare(TOKENIZER).train) == ["b"]
    assert len(hashed) == 5


def test_processes_that_start_at_once_hash_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", SCHEMAS["alpaca"])
    aged(path, monkeypatch)
    counted: list[int] = []
    original = hashes._hashed
    monkeypatch.setattr(hashes, "_hashed", lambda path: counted.append(1) or original(path))
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def child() -> None:
        hashes.sha256(path, tmp_path / "memory")
        results.put(len(counted))

    children = [fork.Process(target=child) for _ in range(4)]
    for one in children:
        one.start()
    assert sorted(results.get(timeout=60) for _ in children) == [0, 0, 0, 1]


def prepare_in_child(path: Path, results: Any) -> None:
    built = []
    original = store.build
    store.build = lambda *args: (built.append(1), original(*args))  # type: ignore[assignment, func-returns-value]
    results.put((len(data(path).prepare(TOKENIZER).train), len(built)))


def test_processes_that_start_at_once_tokenize_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[SCHEMAS["alpaca"]] * 3000)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    children = [fork.Process(target=prepare_in_child, args=(path, results)) for _ in range(3)]
    for child in children:
        child.start()
    found = [results.get(timeout=60) for _ in children]
    assert sorted(found) == [(3000, 0), (3000, 0), (3000, 1)]


def test_a_build_that_dies_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", *[SCHEMAS["alpaca"]] * 10)

    def die(child: Path) -> None:
        monkeypatch.setattr(Path, "rename", lambda *args: os._exit(9))
        data(child).prepare(TOKENIZER)

    process = multiprocessing.get_context("fork").Process(target=die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(data(path).prepare(TOKENIZER).train) == 10
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "a.jsonl", SCHEMAS["alpaca"])
    with pytest.raises(DataError, match=r"cannot be written.*cache_dir"):
        data(path, cache_dir=tmp_path / "file" / "x").prepare(TOKENIZER)


def test_a_cache_that_may_only_be_read_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", SCHEMAS["alpaca"])
    data(path).prepare(TOKENIZER)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert replies(data(path).prepare(TOKENIZER).train) == ["a"]


def test_code_without_a_file_is_told_apart_by_what_it_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", SCHEMAS["alpaca"])
    for ending in ("!", "?"):  # a cell of a notebook, edited and run again
        scope: dict[str, Any] = {"SFTData": SFTData, "__name__": "a_notebook"}
        exec(
            "class Mine(SFTData):\n"
            "    def conversation(self, row):\n"
            f"        return SFTData.conversation(self, {{**row, 'output': row['output'] + {ending!r}}})",
            scope,
        )
        assert replies(scope["Mine"](sources=[Source(name_or_path=str(path))]).prepare(TOKENIZER).train) == [
            "a" + ending
        ]
