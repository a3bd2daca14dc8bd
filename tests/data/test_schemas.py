"""What rows mean: the schemas that are recognised, and rows that are refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_data import SCHEMAS, TOKENIZER, data, replies, texts, write
from tokens import byte_tokenizer

from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError


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
