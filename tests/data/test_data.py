"""From files to documents: what is read of files and folders, refused, cut and counted."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from small_data import GSM8K, LONG, SCHEMAS, TOKENIZER, data, replies, write
from tokens import byte_tokenizer

from posttrain.blocks.data.kinds.causal import CausalData
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.errors import DataError


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


# -- plain text -----------------------------------------------------------------------


def test_plain_documents_are_trained_whole_with_the_tokens_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "de"})
    for bos, eos, expected in ((False, True, "abc</s>"), (True, False, "<s>abc"), (False, False, "abc")):
        tokenizer = byte_tokenizer(eos="</s>")
        made = CausalData(sources=[Source(name_or_path=str(path))], bos=bos, eos=eos)
        ids, mask = made.prepare(tokenizer).train[0].documents[0]
        assert tokenizer.decode(ids.tolist()) == expected
        assert mask.all()
        assert made.prepare(tokenizer).train.supervised[0] == len(ids) - 1


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


def test_an_evaluation_sees_each_row_once_whatever_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"prompt": "q", "response": f"answer {i}"} for i in range(40)])
    source = Source(name_or_path=str(path), weight=0.5)
    for options in ({"eval_split": 0.5}, {"eval_sources": [source]}):
        prepared = SFTData(sources=[source], **options).prepare(TOKENIZER)
        assert prepared.eval is not None
        assert (prepared.train.weights, prepared.eval.weights) == ([0.5], [1.0])


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
