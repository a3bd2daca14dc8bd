"""Data as people have them: rows in memory, texts, patterns, and mixtures by share."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokens import byte_tokenizer

from posttrain.blocks.data.kinds.causal import CausalData
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError

TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])
ROWS = [{"prompt": f"{n}?", "response": f"{n}!"} for n in range(5)]


def generated() -> Iterator[dict[str, Any]]:
    yield from ROWS


# -- rows from Python -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "dataset", "generator", "among names"])
def test_rows_in_memory_are_trained_on_like_those_of_a_file(tmp_path: Path, form: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given: Any = {
        "list": ROWS, "dataset": datasets.Dataset.from_list(ROWS), "generator": generated(), "among names": [ROWS],
    }[form]  # fmt: skip
    ours = SFTData(sources=given, max_length=128).prepare(TOKENIZER).train
    theirs = SFTData(sources=[str(file)], max_length=128).prepare(TOKENIZER).train  # type: ignore[list-item]
    assert [ours[n].documents[0][0].tolist() for n in range(5)] == [
        theirs[n].documents[0][0].tolist() for n in range(5)
    ]


def test_the_same_rows_are_the_same_source_so_that_a_run_goes_on(tmp_path: Path) -> None:
    first, again = SFTData(sources=ROWS), SFTData(sources=generated())  # type: ignore[arg-type]
    assert first.sources == again.sources
    assert SFTData(sources=ROWS[:4]).sources != first.sources  # type: ignore[arg-type]
    rows = [json.loads(line) for line in first.sources[0].path.read_text().splitlines()]
    assert rows == ROWS
    assert [path.suffix for path in first.sources[0].path.parent.iterdir()] == [".jsonl", ".jsonl"]


def test_rows_that_cannot_be_kept_are_refused() -> None:
    wrong: list[tuple[Any, str]] = [
        ([{"prompt": "q", "response": {1, 2}}], "row 0 cannot be kept: Object of type set"),
        (iter([ROWS[0], "text"]), "row 1 is no dict, but str"),
        (iter([]), "there are no rows"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "choose one of its splits, train"),
    ]
    for rows, message in wrong:
        with pytest.raises(DataError, match=message):
            SFTData(sources=rows)


# -- texts and patterns ---------------------------------------------------------------


def texts(data: CausalData) -> list[str]:
    train = data.prepare(TOKENIZER).train
    return [TOKENIZER.decode(train[n].documents[0][0], skip_special_tokens=True) for n in range(len(train))]


def test_a_text_file_is_one_document_and_a_pattern_names_many(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.md").write_bytes("# Ä\r\n\none\n".encode())
    (tmp_path / "deep" / "er" / "b.md").write_text("two")
    (tmp_path / "c.txt").write_text("three")
    assert texts(CausalData(sources=[str(tmp_path / "c.txt")])) == ["three"]  # type: ignore[list-item]
    pattern = CausalData(sources=[str(tmp_path / "**" / "*.md")])  # type: ignore[list-item]
    assert list(pattern.check()) == []
    assert texts(pattern) == ["# Ä\r\n\none\n", "two"]  # nothing of a text is altered
    for wrong, message in (("*", "files of several formats"), ("*.rst", "fits no file")):
        with pytest.raises(DataError, match=message):
            CausalData(sources=[str(tmp_path / wrong)]).prepare(TOKENIZER)  # type: ignore[list-item]


def test_notes_beside_rows_are_no_data(tmp_path: Path) -> None:
    """A README.md or a license in a folder of rows is left alone, and a folder of texts says how to name them."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    for name in ("README.md", "notes.txt"):
        (tmp_path / "rows" / name).write_text("not data")
    assert len(SFTData(sources=[str(tmp_path / "rows")]).prepare(TOKENIZER).train) == 1  # type: ignore[list-item]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"to read texts, name them: .*texts/\*\.txt"):
        CausalData(sources=[str(tmp_path / "texts")]).prepare(TOKENIZER)  # type: ignore[list-item]


# -- shares ---------------------------------------------------------------------------


def mixture(tmp_path: Path, counts: tuple[int, ...], shares: tuple[float, ...], **options: Any) -> SFTData:
    sources = []
    for number, (count, share) in enumerate(zip(counts, shares, strict=True)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"prompt": "q", "response": str(number)}) + "\n" for _ in range(count)))
        sources.append(Source(name_or_path=str(file), share=share, **options))
    return SFTData(sources=sources, max_length=64, packing=False, window=64)


def drawn(data: SFTData) -> Counter[str]:
    loaders = data.build(TOKENIZER, 1, 0, 1, 42)
    replies = (TOKENIZER.decode(batch.targets, skip_special_tokens=True).strip() for batch in loaders.train.one_pass())
    return Counter(replies)


@pytest.mark.parametrize("stream", [False, True])
def test_a_pass_holds_the_shares_that_were_asked_for(tmp_path: Path, stream: bool) -> None:
    """300 rows of the first are as many as can be had at 3 to 1 with 1,000 of the second."""
    found = drawn(mixture(tmp_path, (300, 1000), (0.75, 0.25), stream=stream))
    assert found["0"] == pytest.approx(300, abs=12 if stream else 0)
    assert found["1"] == pytest.approx(100, abs=30)


def test_shares_are_of_all_sources_or_of_none(tmp_path: Path) -> None:
    file = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("")
    some = SFTData(sources=[Source(name_or_path=file, share=0.5), Source(name_or_path=file)])
    assert [message for _, message in some.check()] == [
        "some have a share and some have not: give all of them one, or none"
    ]
    both = Source(name_or_path=file, share=0.5, weight=2.0)
    assert [where for where, _ in both.check()] == ["share"]
    held = SFTData(sources=[file], eval_sources=[Source(name_or_path=file, share=1.0)])  # type: ignore[list-item]
    assert [where for where, _ in held.check()] == ["eval_sources"]
