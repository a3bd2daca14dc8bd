"""From files to documents: what is read, refused, cut, cached and counted."""

import gzip
import json
import multiprocessing
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokens import byte_tokenizer

from posttrain.blocks.data import hashes, store
from posttrain.blocks.data.kinds.causal import CausalData
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.blocks.data.streams import Stream
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError

TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])
GSM8K = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "gsm8k_train.jsonl"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data(path: Path | str, **options: Any) -> SFTData:
    source = options.pop("source", {})
    return SFTData(sources=[Source(name_or_path=str(path), **source)], **options)


def texts(documents: Any) -> list[str]:
    return [TOKENIZER.decode(documents[i].documents[0][0].tolist()) for i in range(len(documents))]


def replies(documents: Any) -> list[str]:
    found = [documents[i].documents[0] for i in range(len(documents))]
    return [TOKENIZER.decode(ids[mask].tolist()).removesuffix("<|im_end|>") for ids, mask in found]


SCHEMAS = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "prompt and response": {"prompt": "q", "response": "a"},
    "prompt as messages": {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "question and answer": {"question": "q", "answer": "a"},
    "query and response": {"query": "q", "response": "a", "type": "MATH"},
    "problem and solution": {"problem": "q", "solution": "a"},
    "openai, with parts and null": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a", "tool_calls": None}]},
    "role and content in conversations": {"conversations": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]},
    "dolly": {"instruction": "q", "context": "", "response": "a", "category": "open_qa"},
    "alpaca of LLaMA-Factory": {"instruction": "q", "input": "", "output": "a", "system": "", "history": []},
    "labelled good": {"prompt": "q", "completion": "a", "label": True},
    "messages as text": {"messages": json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])},
}  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_known_schemas_are_recognised(tmp_path: Path, schema: str) -> None:
    prepared = data(write(tmp_path / "a.jsonl", SCHEMAS[schema])).prepare(TOKENIZER)
    expected = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert texts(prepared.train) == [expected]
    assert replies(prepared.train) == ["a"]


def test_other_schemas_are_mapped_with_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"frage": "q", "antwort": "a"})
    with pytest.raises(DataError, match="'frage', 'antwort' fit no known schema.*columns"):
        data(path).prepare(TOKENIZER)
    mapped = data(path, source={"columns": {"prompt": "frage", "response": "antwort"}})
    assert replies(mapped.prepare(TOKENIZER).train) == ["a"]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": f'{i}, "x"\n', "response": f"é{i}"} for i in range(5)]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    made = datasets.Dataset.from_list(rows)
    made.to_csv(tmp_path / "a.csv", index=False)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "part-1.jsonl", *rows[:2])
    write(tmp_path / "folder" / "part-2.jsonl", *rows[2:])
    for name in ("a.jsonl", "a.json", "b.jsonl.gz", "a.csv", "a.parquet", "saved", "folder"):
        assert replies(data(tmp_path / name).prepare(TOKENIZER).train) == [f"é{i}" for i in range(5)], name


GOOD = json.dumps({"prompt": "q", "response": "a"})
BAD_FILES = {
    "truncated": (f"{GOOD}\n{GOOD[:20]}".encode(), r"a\.jsonl:2: not JSON.*last line is incomplete"),
    "not UTF-8": (f"{GOOD}\n".encode() + b'{"prompt": "\xff"}\n', r"a\.jsonl:2: not UTF-8.*0xff"),
    "not an object": (b"[1, 2]\n", r"a\.jsonl:1: expected an object with columns, found a list"),
    "empty": (b"", r"a\.jsonl holds no rows"),
    "without a reply": (b'{"prompt": "q"}\n', r"1 x no reply: there is 'prompt'.*a\.jsonl:1"),
    "unknown role": (
        b'{"messages": [{"role": "narrator", "content": "x"}]}\n',
        r"1 x unknown role 'narrator'.*a\.jsonl:1",
    ),
    "nested without end": (b'{"prompt": ' + b"[" * 100_000, r"a\.jsonl:1: (nested too deeply|not JSON)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_reported_with_its_name_and_line(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data(tmp_path / "a.jsonl").prepare(TOKENIZER)


def test_a_missing_file_is_noticed_without_reading_anything(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", SCHEMAS["alpaca"])
    problems = dict(Source(name_or_path=str(tmp_path / "trian.jsonl")).check())
    assert "did you mean 'train.jsonl'" in problems["name_or_path"]


def test_unusable_rows_are_dropped_and_counted_if_the_recipe_says_so(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "only a question"}]}
    path = write(tmp_path / "a.jsonl", SCHEMAS["messages"], bad, bad, SCHEMAS["messages"])
    with pytest.raises(
        DataError, match=r"(?s)2 x no message has a trained role.*a\.jsonl:2.*a\.jsonl:3.*data\.invalid=drop"
    ):
        data(path).prepare(TOKENIZER)
    prepared = data(path, invalid="drop").prepare(TOKENIZER)
    (entry,) = prepared.ledger["sources"].values()
    assert (entry["rows_in"], entry["documents"], sum(entry["dropped"].values())) == (4, 2, 2)


LONG = [{"prompt": "q" * 10, "response": "a" * n} for n in (5, 100, 20, 200)]
"""With the template's 42 tokens and the end of the turn: 58, 153, 73 and 253 tokens."""


def test_rows_that_are_too_long_stop_the_run_with_figures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 4 rows are longer than 100 tokens \(the longest has \d+\)"):
        data(write(tmp_path / "a.jsonl", *LONG), max_length=100).prepare(TOKENIZER)


@pytest.mark.parametrize(("overflow", "documents"), [("drop", 2), ("truncate", 4), ("split", 7)])
def test_overflow_policies_count_what_they_leave_out(tmp_path: Path, overflow: Any, documents: int) -> None:
    path = write(tmp_path / "a.jsonl", *LONG)
    whole = data(path).prepare(TOKENIZER)
    prepared = data(path, max_length=100, overflow=overflow).prepare(TOKENIZER)
    (entry,) = prepared.ledger["sources"].values()
    lengths = prepared.train.lengths
    assert len(prepared.train) == entry["documents"] == documents
    assert lengths.max() <= 100
    assert entry["tokens"] + entry["tokens_cut"] == entry["tokens_in"] == whole.train.lengths.sum()
    found = [prepared.train[i].documents[0][1] for i in range(documents)]
    assert prepared.train.supervised[:, 0].tolist() == [int(mask[1:].sum()) for mask in found]
    assert prepared.ledger["total"]["documents"] == documents
    if overflow == "split":
        ours = sorted(t for i in range(documents) for t in prepared.train[i].documents[0][0].tolist())
        assert ours == sorted(t for i in range(4) for t in whole.train[i].documents[0][0].tolist())


def test_held_out_rows_are_never_trained_on_and_no_seed_changes_them(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": f"answer {i}"} for i in range(400)]
    prepared = data(write(tmp_path / "a.jsonl", *rows), eval_split=0.1).prepare(TOKENIZER)
    assert prepared.eval is not None
    train, held_out = set(replies(prepared.train)), set(replies(prepared.eval))
    assert not train & held_out
    assert len(train | held_out) == 400
    assert 35 <= len(held_out) <= 45


def test_max_rows_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\nnot json\n")
    assert len(data(path, source={"max_rows": 2}).prepare(TOKENIZER).train) == 2


# -- the cache ------------------------------------------------------------------------


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


# -- plain text and streams -----------------------------------------------------------


def test_plain_documents_are_trained_whole_with_the_tokens_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "de"})
    for bos, eos, expected in ((False, True, "abc</s>"), (True, False, "<s>abc"), (False, False, "abc")):
        tokenizer = byte_tokenizer(eos="</s>")
        made = CausalData(sources=[Source(name_or_path=str(path))], bos=bos, eos=eos)
        ids, mask = made.prepare(tokenizer).train[0].documents[0]
        assert tokenizer.decode(ids.tolist()) == expected
        assert mask.all()
        assert made.prepare(tokenizer).train.supervised[0] == len(ids) - 1


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


def test_previews_show_tokens_roles_and_supervision(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "né", "response": "ok"})
    (preview,) = data(path).preview(TOKENIZER, 5)
    assert preview.source == f"{path}:1"
    assert "".join(text for text, _, _ in preview.tokens) == (
        "<|im_start|>user\nné<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    )
    assert [text for text, supervised, _ in preview.tokens if supervised] == ["o", "k", "<|im_end|>"]
    assert {role for text, _, role in preview.tokens if text == "é"} == {"user"}


def test_known_datasets_know_their_splits_and_columns() -> None:
    from posttrain.blocks.data.sources import KNOWN

    assert KNOWN["HuggingFaceH4/ultrachat_200k"].splits["train"] == "train_sft"
    assert KNOWN["meta-math/MetaMathQA"].columns["prompt"] == "query"


def test_a_hub_that_is_away_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"someone/something is no local file or folder.*hub"):
        list(islice(data("someone/something").preview(TOKENIZER, 1), 1))


@pytest.mark.skipif(not GSM8K.exists(), reason=f"{GSM8K} is not on this machine")
def test_gsm8k_trains_end_to_end(tmp_path: Path, tiny_model: Path) -> None:
    import posttrain

    run = posttrain.SFTTrainer(
        model=posttrain.HFModel(name_or_path=str(tiny_model)),
        data=data(GSM8K, max_length=1024, overflow="drop", source={"max_rows": 300}),
        optimizer=posttrain.AdamW(lr=1e-2), logger=[posttrain.JSONL()], micro_batch_size=2, max_steps=50,
        output_dir=tmp_path / "run", accelerator="cpu",
    ).train()  # fmt: skip
    curve = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(curve) == run.step == 50
    assert sum(curve[-5:]) / 5 < 0.75 * curve[0]


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


def test_a_cache_that_may_only_be_read_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", SCHEMAS["alpaca"])
    data(path).prepare(TOKENIZER)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert replies(data(path).prepare(TOKENIZER).train) == ["a"]


def test_an_evaluation_sees_each_row_once_whatever_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"prompt": "q", "response": f"answer {i}"} for i in range(40)])
    source = Source(name_or_path=str(path), weight=0.5)
    for options in ({"eval_split": 0.5}, {"eval_sources": [source]}):
        prepared = SFTData(sources=[source], **options).prepare(TOKENIZER)
        assert prepared.eval is not None
        assert (prepared.train.weights, prepared.eval.weights) == ([0.5], [1.0])


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


def test_an_error_of_the_schema_names_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"frage": "q"})
    with pytest.raises(DataError, match=r"a\.jsonl: columns 'frage' fit no known schema"):
        data(path).prepare(TOKENIZER)


def test_alpaca_history_and_dolly_context_are_trained_on(tmp_path: Path) -> None:
    rows = [
        {"instruction": "q", "input": "about", "output": "a", "history": [["q1", "a1"], ["q2", "a2"]]},
        {"instruction": "q", "context": "about", "response": "a"},
    ]
    found = texts(data(write(tmp_path / "a.jsonl", *rows)).prepare(TOKENIZER).train)
    assert "".join(found).count("user\nq\n\nabout<|im_end|>") == 2
    assert found[0].startswith(
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2"
    )


def test_tool_calls_of_every_format_are_one() -> None:
    from posttrain.blocks.data.rows.schemas import conversation

    function = {"name": "add", "description": "d", "parameters": {}}
    call, text = {"name": "add", "arguments": {"a": 1}}, json.dumps({"a": 1})
    openai = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call | {"arguments": text}}]},
            {"role": "tool", "content": "1"},
        ],
        "tools": [{"type": "function", "function": function}],
    }  # fmt: skip
    legacy = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": call | {"arguments": text}},
            {"role": "function", "content": "1"},
        ],
        "functions": [function],
    }
    factory = {
        "conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "1"},
        ],
        "tools": json.dumps([function]), "system": "",
    }  # fmt: skip
    swift = {
        "messages": [
            {"role": "user", "content": "q"}, {"role": "tool_call", "content": json.dumps(call)}, {"role": "tool_response", "content": "1"},
        ],
        "tools": [json.dumps(function)],
    }  # fmt: skip
    expected = conversation(openai)
    assert expected["messages"][1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    for row in (legacy, factory, swift):
        assert conversation(row) == expected


REFUSED = {
    "a reply to avoid": ({"prompt": "q", "completion": "a", "label": False}, "'label' is false: the reply is one to avoid"),
    "a reply to avoid, as text": ({"messages": SCHEMAS["messages"]["messages"], "kto_tag": "False"}, "'kto_tag' is false"),
    "two system prompts": (
        {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, {"role": "user", "content": "q"}]}, "two system prompts",
    ),
    "an unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, r"unknown role 'narrator' \(known: system, developer, user"),
    "no role": ({"messages": [{"speaker": "me", "text": "x"}]}, "has the keys 'speaker', 'text', but no role"),
    "a call that is no JSON": ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "is no JSON"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "an image is dict, not a path"),
    "half a weight": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}, "weight 0.5: only 0",
    ),
    "a system prompt that is no text": ({"system": {"a": 1}, "prompt": "q", "completion": "a"}, "the system prompt is dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_mean_something_else_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    row, reason = REFUSED[name]
    with pytest.raises(DataError, match=f"1 x .*{reason}"):
        data(write(tmp_path / "a.jsonl", row, SCHEMAS["messages"])).prepare(TOKENIZER)


def test_kto_rows_train_the_good_replies_and_count_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": f"a{n}", "label": n % 2 == 0} for n in range(4)]
    prepared = data(write(tmp_path / "a.jsonl", *rows), invalid="drop").prepare(TOKENIZER)
    assert replies(prepared.train) == ["a0", "a2"]
    ((reason, count),) = prepared.ledger["total"]["dropped"].items()
    assert "one to avoid" in reason and count == 2


def test_a_row_may_bring_variables_for_the_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["chatml"] + "{{ mood }}")
    row = {"prompt": "q", "completion": "a", "chat_template_kwargs": {"mood": "glad"}}
    prepared = data(write(tmp_path / "a.jsonl", row)).prepare(tokenizer)
    assert tokenizer.decode(prepared.train[0].documents[0][0].tolist()).endswith("glad")


def test_the_ledger_says_which_columns_were_read_as_what_and_which_were_not(tmp_path: Path) -> None:
    from posttrain.blocks.loggers.ledger import ledger

    path = write(
        tmp_path / "a.jsonl", {**SCHEMAS["alpaca"], "id": 7, "mood": None}, {**SCHEMAS["alpaca"], "score": 1.0}
    )
    for stream in (False, True):
        loaders = data(path, source={"stream": stream}).build(TOKENIZER, 1, 0, 1, 42)
        assert list(loaders.train.one_pass())
        entry = loaders.ledger["sources"][str(path)]
        assert (entry["schema"], entry["read"], entry["unused"]) == (
            "instruction/output", ["instruction", "output"], ["id", "score"],
        )  # fmt: skip
        caption = str(ledger(loaders.ledger).caption)
        assert f"{path}: instruction/output: read instruction, output; not used: id, score" in caption

    class Mine(SFTData):
        def conversation(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"messages": [{"role": "assistant", "content": str(row["id"])}]}

    first = write(tmp_path / "b.jsonl", {"id": 7, "x": 1})
    (entry,) = Mine(sources=[Source(name_or_path=str(first))]).prepare(TOKENIZER).ledger["sources"].values()
    assert "unused" not in entry  # only the class knows


def test_a_conversation_split_into_turns_stays_on_one_side_of_the_evaluation(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{text} {{}}"} for text in ("one", "two") for role in ("user", "assistant")]
    rows = [{"messages": [m | {"content": m["content"].format(n)} for m in turns]} for n in range(60)]
    path = write(tmp_path / "a.jsonl", *rows)
    prepared = data(path, split_turns=True, eval_split=0.2).prepare(TOKENIZER)
    assert prepared.eval is not None
    train, held_out = replies(prepared.train), replies(prepared.eval)
    assert len(train) + len(held_out) == 120
    assert not {text.split()[1] for text in train} & {text.split()[1] for text in held_out}
    streamed = data(path, split_turns=True, source={"stream": True}).build(TOKENIZER, 1, 0, 1, 42)
    stored = data(path, split_turns=True).build(TOKENIZER, 1, 0, 1, 42)
    count = [sum(batch["supervised_tokens"] for batch in loaders.train.one_pass()) for loaders in (streamed, stored)]
    assert count[0] == count[1] > 0
    previews = list(data(path, split_turns=True).preview(TOKENIZER, 1))
    assert [preview.side for preview in previews] == ["turn 1", "turn 2"]
    assert previews[0].columns == {"schema": "messages", "read": ["messages"], "unused": []}


# -- splits of a folder ---------------------------------------------------------------


def folder_of(tmp_path: Path, *names: str, readme: str | None = None) -> Path:
    """A folder whose files hold one row each, with the file's name as the reply."""
    import datasets

    for name in names:
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": "q", "response": Path(name).name.split(".")[0]}
        if file.suffix == ".parquet":
            datasets.Dataset.from_list([row]).to_parquet(file)
        elif file.suffix == ".csv":
            file.write_text(f"prompt,response\nq,{row['response']}\n")
        else:
            write(file, row)
    if readme is not None:
        (tmp_path / "folder" / "README.md").write_text(f"---\n{readme}\n---\n")
    return tmp_path / "folder"


ULTRACHAT = tuple(f"data/{n}-00000-of-00001.parquet" for n in ("train_sft", "train_gen", "test_sft", "test_gen"))
CONFIGS = """\
configs:
- config_name: sft
  default: true
  data_files:
  - {split: train, path: data/train_sft-*}
  - {split: test, path: data/test_sft-*}
- config_name: gen
  data_files: [{split: train, path: data/train_gen-*}]"""
SPLIT_FOLDERS: dict[str, tuple[tuple[str, ...], str | None, dict[str, Any], list[str]]] = {
    "names": (("train.jsonl", "test.jsonl"), None, {}, ["train"]),
    "other names of a split": (("training_1.jsonl", "dev.jsonl"), None, {"split": "validation"}, ["dev"]),
    "folders": (("train/a.jsonl", "train/b.jsonl", "test/c.jsonl"), None, {}, ["a", "b"]),
    "no split": (("a.jsonl", "b.jsonl"), None, {}, ["a", "b"]),
    "a local copy of ultrachat": (ULTRACHAT, None, {"split": "train_sft"}, ["train_sft-00000-of-00001"]),
    "a README that names configurations": (ULTRACHAT, CONFIGS, {}, ["train_sft-00000-of-00001"]),
    "another configuration": (ULTRACHAT, CONFIGS, {"name": "gen"}, ["train_gen-00000-of-00001"]),
    "its test split": (ULTRACHAT, CONFIGS, {"split": "test"}, ["test_sft-00000-of-00001"]),
}


@pytest.mark.parametrize("name", SPLIT_FOLDERS)
def test_the_files_of_a_folder_belong_to_splits_as_datasets_says(tmp_path: Path, name: str) -> None:
    names, readme, source, expected = SPLIT_FOLDERS[name]
    folder = folder_of(tmp_path, *names, readme=readme)
    assert list(Source(name_or_path=str(folder), **source).check()) == []
    assert replies(data(folder, source=source).prepare(TOKENIZER).train) == expected


WRONG_FOLDERS: dict[str, tuple[tuple[str, ...], str | None, dict[str, Any], str]] = {
    "no such split": (ULTRACHAT, None, {}, "holds the splits test_gen, test_sft, train_gen, train_sft, not 'train'"),
    "no such configuration": (ULTRACHAT, CONFIGS, {"name": "nope"}, "'nope' not found. Available: .*sft.*gen"),
    "several formats": (("a.jsonl", "b.csv", "c.jsonl"), None, {}, r"several formats \(.jsonl, .csv\)"),
    "nothing to read": (("notes.txt",), None, {}, "holds no file that can be read"),
    "a README that is no YAML": (("a.jsonl",), "configs: [", {}, "cannot be read as a dataset"),
}


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_a_folder_that_cannot_be_read_is_a_message(tmp_path: Path, name: str) -> None:
    names, readme, source, message = WRONG_FOLDERS[name]
    with pytest.raises(DataError, match=message):
        data(folder_of(tmp_path, *names, readme=readme), source=source).prepare(TOKENIZER)


def test_files_in_no_split_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path, "train.jsonl", "extra.jsonl")
    assert replies(data(folder).prepare(TOKENIZER).train) == ["train"]
    assert "extra.jsonl: in no split, and not read" in caplog.text


# -- the ledger of a stream -----------------------------------------------------------


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


# -- sources from Python --------------------------------------------------------------


def test_sources_are_names_mappings_or_sources() -> None:
    made = SFTData(sources=["a.jsonl", Path("b.jsonl"), {"name_or_path": "c.jsonl", "weight": 2.0}])  # type: ignore[list-item]
    assert [(source.name_or_path, source.weight) for source in made.sources] == [
        ("a.jsonl", 1.0), ("b.jsonl", 1.0), ("c.jsonl", 2.0),
    ]  # fmt: skip
    assert SFTData(sources="a.jsonl").sources == SFTData(sources=["a.jsonl"]).sources  # type: ignore[arg-type, list-item]
    wrong: list[tuple[Any, str]] = [
        ({"prompt": "q"}, "dict is no source; rows are a list of such"),
        ([5], "int is no source; write the name of a file"),
        ([{"name_or_path": "a.jsonl", "wieght": 2}], "no such key as 'wieght'; did you mean 'weight'"),
    ]
    for sources, message in wrong:
        with pytest.raises(DataError, match=message):
            SFTData(sources=sources)


def test_roles_that_no_message_has_are_noticed_without_reading_anything() -> None:
    ((where, message),) = SFTData(sources=["x.jsonl"], train_on=["asistant", "user"]).check()  # type: ignore[list-item]
    assert (
        where == "train_on"
        and "'asistant' is no role of a message" in message
        and "did you mean 'assistant'" in message
    )
    ((where, message),) = SFTData(sources=["x.jsonl"], last_turn_only=True, split_turns=True).check()  # type: ignore[list-item]
    assert where == "split_turns" and "choose one" in message
