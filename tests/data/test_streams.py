"""Sources that are read while training: they go on from any row, and count like stored ones."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from small_data import LONG, TOKENIZER, data, write

from posttrain.blocks.data.sources import Source
from posttrain.blocks.data.streams import Stream
from posttrain.errors import DataError


def test_a_stream_goes_on_from_any_row(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *({"n": i} for i in range(20)))
    (tmp_path / "b.json").write_text(json.dumps([{"n": 100 + i} for i in range(9)]))
    half = write(tmp_path / "c.jsonl", *({"n": 1000 + i} for i in range(40)))
    files: tuple[tuple[Path, float], ...] = ((first, 2), (tmp_path / "b.json", 1), (half, 0.5))
    sources = [Source(name_or_path=str(file), weight=weight) for file, weight in files]
    whole = [(row.values["n"], json.loads(json.dumps(state))) for row, _, state in Stream(sources, 7).read(0, None)]
    assert sorted(n for n, _ in whole) == sorted(
        [*range(20), *range(20), *range(100, 109), *(n for n, _ in whole if n >= 1000)]
    )
    assert 10 <= sum(n >= 1000 for n, _ in whole) <= 30
    for cut in range(len(whole)):
        rest = [row.values["n"] for row, _, _ in Stream(sources, 7).read(0, whole[cut][1])]
        assert rest == [n for n, _ in whole[cut + 1 :]]
    assert [n for n, _ in whole] != [row.values["n"] for row, _, _ in Stream(sources, 7).read(1, None)]


def test_a_streaming_recipe_sees_the_same_documents_as_a_stored_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *LONG, {"prompt": "q"})
    options: dict[str, Any] = {"max_length": 100, "overflow": "split", "invalid": "drop"}
    stored = data(path, **options).build(TOKENIZER, 1, 0, 1, 42)
    streamed = data(path, source={"stream": True}, **options).build(TOKENIZER, 1, 0, 1, 42)
    tokens = [
        sorted(t for batch in loaders.train.one_pass() for t in batch["input_ids"].flatten().tolist() if t != 256)
        for loaders in (stored, streamed)
    ]
    count = [sum(batch["supervised_tokens"] for batch in loaders.train.one_pass()) for loaders in (stored, streamed)]
    assert count[0] == count[1]
    assert len(tokens[0]) and [t for t in tokens[0] if t != TOKENIZER.pad_token_id] == [
        t for t in tokens[1] if t != TOKENIZER.pad_token_id
    ]
    next(streamed.train.batches(streamed.train.start()))
    assert streamed.ledger["sources"][str(path)]["rows_in"] >= 5


def test_a_stream_goes_on_from_any_row_of_every_format(tmp_path: Path) -> None:
    import datasets

    rows = [{"n": str(i), "text": "é\n" * i} for i in range(1200)]  # more than a batch of the readers
    made = datasets.Dataset.from_list(rows)
    made.to_csv(tmp_path / "a.csv", index=False)
    made.to_parquet(tmp_path / "a.parquet", batch_size=300)
    made.save_to_disk(tmp_path / "saved")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("a.csv", "a.parquet", "saved", "a.jsonl.gz"):
        stream = Stream([Source(name_or_path=str(tmp_path / name))], 0)
        whole = [(row.values, json.loads(json.dumps(state))) for row, _, state in stream.read(0, None)]
        assert [values["n"] for values, _ in whole] == [row["n"] for row in rows], name
        for cut in (0, 298, 299, 511, 512, 1000, 1199):
            rest = [row.values for row, _, _ in stream.read(0, whole[cut][1])]
            assert rest == [values for values, _ in whole[cut + 1 :]], (name, cut)


def test_a_hub_stream_goes_on_from_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(name: str, configuration: str | None, **options: Any) -> Any:
        asked.update(options, name=name, configuration=configuration)
        return datasets.Dataset.from_list([{"query": str(i), "response": "a"} for i in range(30)]).to_iterable_dataset(
            3
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = Stream([Source(name_or_path="meta-math/MetaMathQA", stream=True, max_rows=25)], 0)
    whole = [(row.values, json.loads(json.dumps(state))) for row, _, state in stream.read(0, None)]
    assert [values["prompt"] for values, _ in whole] == [str(i) for i in range(25)]
    assert (asked["split"], asked["streaming"]) == ("train", True)
    for cut in (0, 9, 10, 24):
        assert [row.values for row, _, _ in stream.read(0, whole[cut][1])] == [values for values, _ in whole[cut + 1 :]]


def test_a_stream_of_which_nothing_can_be_used_ends_with_a_message(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "q"})
    loaders = data(path, source={"stream": True}, invalid="drop").build(TOKENIZER, 1, 0, 1, 42)
    with pytest.raises(DataError, match="gave no row that can be trained on"):
        next(loaders.train.batches(loaders.train.start()))


def test_a_stream_counts_what_a_stored_source_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *LONG, {"prompt": "q"}, {"prompt": "q"})
    for overflow in ("drop", "truncate", "split"):
        options: dict[str, Any] = {"max_length": 100, "overflow": overflow, "invalid": "drop"}
        stored = data(path, **options).build(TOKENIZER, 1, 0, 1, 42).ledger["sources"][str(path)]
        streamed = data(path, source={"stream": True}, window=2, **options).build(TOKENIZER, 1, 0, 1, 42)
        assert sum(batch["tokens"] for batch in streamed.train.one_pass()) == stored["tokens"]
        (entry,) = streamed.ledger["sources"].values()
        counts = {reason: found["count"] for reason, found in entry["dropped"].items()}
        assert {**entry, "dropped": counts} == stored


def test_the_ledger_of_a_stream_is_kept_with_the_run_and_goes_on_after_a_stop(tmp_path: Path, tiny_model: Path) -> None:
    import posttrain

    rows = [{"prompt": "q", "response": "a" * (300 if n % 5 == 0 else n % 7 + 1)} for n in range(40)]
    path = write(tmp_path / "a.jsonl", *rows)

    def run(folder: str, **options: Any) -> dict[str, Any]:
        posttrain.SFTTrainer(
            model=posttrain.HFModel(name_or_path=str(tiny_model)),
            data=data(path, max_length=128, overflow="drop", window=8, source={"stream": True}),
            logger=[posttrain.JSONL()], max_steps=12, output_dir=tmp_path / folder, accelerator="cpu", **options,
        ).train()  # fmt: skip
        found: dict[str, Any] = json.loads((tmp_path / folder / "ledger.json").read_text())["sources"]
        return found

    whole = run("whole")
    (entry,) = whole.values()
    assert entry["rows_in"] % 8 == 0 and entry["rows_in"] >= 24
    assert entry["dropped"]["longer than 128 tokens"]["count"] == -(-entry["rows_in"] // 5)
    assert run("cut", stop_after=5) != whole
    assert run("cut") == whole
