"""Preference data: every usual schema, the shared prompt found by messages, exact masks, and a ledger of what is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokens import byte_tokenizer

from posttrain.blocks.data.kinds.preference import PreferenceData
from posttrain.blocks.data.rows.pairs import pair
from posttrain.blocks.data.rows.schemas import Refused
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError

TOKENIZER = byte_tokenizer(TEMPLATES["chatml"])
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "Be brief."}

SCHEMAS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "a question": {"question": "2+2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "text behind messages": {"prompt": [USER], "chosen": "4", "rejected": "5"},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations and their prompt as text": {
        "prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD],
        "score_chosen": 8.0, "score_rejected": 2.0,
    },
    "whole conversations and their prompt as messages": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "from and value": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"},
    },
    "a dialogue as text": {
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
    },
    "OpenAI's own": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD], "non_preferred_output": [BAD],
    },
    "responses": {"prompt": "2+2?", "chosen_response": "4", "rejected_response": "5"},
    "messages as JSON text": {"conversations": json.dumps([USER]), "chosen": "4", "rejected": "5"},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_gives_the_same_pair(name: str) -> None:
    chosen, rejected = pair(SCHEMAS[name]).conversations
    assert chosen == {"messages": [USER, GOOD], "shared": 1}
    assert rejected == {"messages": [USER, BAD], "shared": 1}


@pytest.mark.parametrize("name", ["text", "messages", "whole conversations", "from and value", "one message"])
def test_a_system_column_goes_in_front_of_both_sides(name: str) -> None:
    for side in pair({**SCHEMAS[name], "system": "Be brief."}).conversations:
        assert side["messages"][:2] == [SYSTEM, USER]
        assert side["shared"] == 2


def test_alpaca_input_and_tools_are_part_of_the_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {"instruction": "Add.", "input": "2 and 2", "chosen": "4", "rejected": "5", "tools": tools}
    for side in pair(row).conversations:
        assert side["messages"][0]["content"] == "Add.\n\n2 and 2"
        assert side["tools"] == tools


def test_only_what_follows_the_shared_messages_is_trained() -> None:
    """The prompt is found by messages: both replies begin with the same words, and those are trained."""
    begin = [USER, GOOD, {"role": "user", "content": "And 3+3?"}]
    row = {
        "chosen": [*begin, {"role": "assistant", "content": "It is 6"}],
        "rejected": [*begin, {"role": "assistant", "content": "It is 7"}],
    }
    sample = pair(row)
    assert [side["shared"] for side in sample.conversations] == [3, 3]
    encoder = PreferenceData(sources=["x.jsonl"]).encoder(TOKENIZER)
    (found,) = encoder.encode([row])
    trained = [TOKENIZER.decode(ids[mask].tolist()) for ids, mask in found.documents]
    assert trained == ["It is 6<|im_end|>", "It is 7<|im_end|>"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "equal sides": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
    "equal conversations": ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are equal"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is empty"),
    "another question": (
        {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "3+3?"}, BAD]},
        "do not answer the same messages",
    ),
    "no reply on one side": ({"chosen": [USER, GOOD], "rejected": [USER]}, "do not answer the same messages"),
    "text without a prompt": ({"chosen": "4", "rejected": "5"}, "there is no prompt"),
    "a margin that is none": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "not a number"),
    "users differ": (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, SYSTEM, GOOD]}, "another role than assistant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_no_pair_are_refused_with_the_reason(name: str) -> None:
    row, reason = REFUSED[name]
    with pytest.raises(Refused, match=reason):
        pair(row)


def test_a_row_without_one_side_is_refused_by_itself(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(3)] + [
        {"prompt": "3?", "chosen": "yes"}
    ]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"1 x there is no 'rejected'.*a\.jsonl:4"):
        PreferenceData(sources=[file]).prepare(TOKENIZER)
    assert len(PreferenceData(sources=[file], invalid="drop").prepare(TOKENIZER).train) == 3


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(DataError, match=r"'question', 'good' hold no 'chosen' and no 'rejected'.*columns"):
        pair({"question": "a", "good": "b"})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_refused_pairs_stop_the_run_or_are_counted_by_reason(tmp_path: Path) -> None:
    good = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(5)]
    bad = [row for row, _ in REFUSED.values()]
    file = write(tmp_path / "pairs.jsonl", [*good, *bad])
    with pytest.raises(DataError, match="2 x chosen and rejected are equal"):
        PreferenceData(sources=[file]).prepare(TOKENIZER)
    prepared = PreferenceData(sources=[file], invalid="drop").prepare(TOKENIZER)
    (entry,) = prepared.ledger["sources"].values()
    assert (entry["rows_in"], entry["pairs"], sum(entry["dropped"].values())) == (14, 5, 9)
    assert entry["dropped"]["chosen and rejected are equal"] == 2
    assert entry["supervised_tokens"] == 5 * (len("yes") + 1 + len("no") + 1)


def test_sides_that_only_the_template_makes_equal_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b "}])
    tokenizer = byte_tokenizer(TEMPLATES["chatml"].replace("message['content']", "message['content'] | trim"))
    assert "trim" in tokenizer.chat_template
    with pytest.raises(DataError, match="chosen and rejected are equal"):
        PreferenceData(sources=[file]).prepare(tokenizer)


def test_overflow_is_that_of_the_longer_side_and_never_tears_a_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": "short?", "chosen": "yes", "rejected": "no"},
        {"prompt": "one long side?", "chosen": "yes " * 40, "rejected": "no"},
        {"prompt": "long " * 40, "chosen": "yes", "rejected": "no"},
        {"prompt": "alike?", "chosen": "same " * 40 + "yes", "rejected": "same " * 40 + "no"},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"3 of 4 rows are longer than 100 tokens"):
        PreferenceData(sources=[file], max_length=100).prepare(TOKENIZER)
    dropped = PreferenceData(sources=[file], max_length=100, overflow="drop").prepare(TOKENIZER)
    assert len(dropped.train) == 1
    cut = PreferenceData(sources=[file], max_length=100, overflow="truncate").prepare(TOKENIZER)
    (entry,) = cut.ledger["sources"].values()
    assert entry["dropped"] == {"cut, no supervised token is left": 1, "cut, chosen and rejected are equal": 1}
    assert len(cut.train) == entry["pairs"] == 2
    assert cut.train.sizes.max() == 100
    assert entry["tokens"] + entry["tokens_cut"] == entry["tokens_in"]
    for index in range(2):
        chosen, rejected = (ids for ids, _ in cut.train[index].documents)
        assert TOKENIZER.decode(chosen[:20].tolist()) == TOKENIZER.decode(rejected[:20].tolist())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_both_sides_of_every_pair_are_side_by_side(tmp_path: Path, packing: bool, stream: bool) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "y" * (n % 17 + 1), "rejected": "n" * (n % 5 + 1)} for n in range(60)]
    source = Source(name_or_path=str(write(tmp_path / "a.jsonl", rows)), stream=stream)
    data = PreferenceData(sources=[source], max_length=80, packing=packing)
    loader = data.build(TOKENIZER, 2, 0, 1, 7).train
    sides: list[str] = []
    for batch, position in loader.batches(loader.start()):
        assert batch["pairs"] == batch["weight"] == len(batch["lengths"])
        ids, lengths = batch["input_ids"].flatten(), torch.diff(batch["ends"], prepend=torch.tensor([-1]))
        for end, length in zip(batch["ends"].tolist(), lengths.tolist(), strict=True):
            text = TOKENIZER.decode(ids[end - length + 1 : end + 1].tolist())
            sides.append(text.split("user\n")[1].split("?")[0] + text.split("assistant\n")[1][0])
        if position["epoch"] > 0:
            break
    assert {(one[:-1], one[-1], other[-1]) for one, other in zip(sides[::2], sides[1::2], strict=True)} == {
        (str(n), "y", "n") for n in range(60)
    }
    assert all(one[:-1] == other[:-1] for one, other in zip(sides[::2], sides[1::2], strict=True))


def test_show_prints_both_sides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [SCHEMAS["text"]])
    previews = list(PreferenceData(sources=[file]).preview(TOKENIZER, 1))
    assert [preview.side for preview in previews] == ["chosen", "rejected"]
    said = ["".join(text for text, trained, _ in preview.tokens if trained) for preview in previews]
    assert said == ["4<|im_end|>", "5<|im_end|>"]


def test_margins_come_with_the_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "y", "rejected": "n", "margin": n / 2} for n in range(3)]
    data = PreferenceData(sources=[write(tmp_path / "a.jsonl", rows)], max_length=64)
    batch = next(iter(data.build(TOKENIZER, 4, 0, 1, 0).train.one_pass()))
    assert sorted(batch["margins"].tolist()) == [0.0, 0.5, 1.0]
