"""Replies of a form, and what a model thought."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
from synth_server import (
    chat,
    client,
    saying,
)

from posttrain.blocks.data.rows.schemas import conversation
from posttrain.errors import DataError
from posttrain.synth import (
    CortexSynth,
    Generate,
    Pipeline,
    TransformersSynth,
)

THOUGHT = "3 and 4 make 7"


THINKING = [
    {"role": "assistant", "content": "7", "reasoning_content": THOUGHT},
    {"role": "assistant", "content": "7", "reasoning": THOUGHT},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "7"}]},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
                                      {"type": "text", "text": "7"}]},
]  # fmt: skip


def thinking(message: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]:
    return lambda body: (200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


@pytest.mark.parametrize("message", THINKING, ids=["vllm", "openrouter", "anthropic", "mistral"])
def test_what_a_model_thought_stays_beside_its_answer(server: Any, tmp_path: Path, message: dict[str, Any]) -> None:
    server.answer = thinking(message)
    made = client(server, tmp_path)
    for mode, wanted in (
        ("column", {"response": "7", "reasoning": THOUGHT}),
        ("think", {"response": f"<think>\n{THOUGHT}\n</think>\n\n7"}),
        ("message", {"messages": [{"role": "user", "content": "3+4"},
                                  {"role": "assistant", "content": "7", "reasoning_content": THOUGHT}]}),
        ("drop", {"response": "7"}),
    ):  # fmt: skip
        report = Pipeline([Generate(model="m", reasoning=mode)]).run([{"prompt": "3+4"}], made, "p")
        (row,) = report.rows()
        said = {name: row[name] for name in ("response", "reasoning", "messages") if name in row}
        assert said == wanted
        assert conversation(row)["messages"][-1].get("reasoning_content") == (THOUGHT if mode == "message" else None)
    assert server.paid_lines == 1


def test_what_a_model_thought_is_exported_for_training(server: Any, tmp_path: Path) -> None:
    server.answer = thinking(THINKING[0])
    made = client(server, tmp_path)
    made.add_chat_to_batch_task("t", [{"role": "user", "content": "3+4"}], model="m")
    made.execute_batch_task("t")
    said = {mode: next(made.iter_rows("t", reasoning=mode))["messages"][-1] for mode in ("field", "think", "drop")}
    assert said == {
        "field": {"role": "assistant", "content": "7", "reasoning_content": THOUGHT},
        "think": {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n7"},
        "drop": {"role": "assistant", "content": "7"},
    }
    (row,) = made.to_dataset("t")
    assert json.loads(row["messages"])[-1]["reasoning_content"] == THOUGHT
    (message, *_) = made.extract_messages_from_responses(made.execute_batch_task("t"))[0]["choices"]
    assert message["reasoning_content"] == THOUGHT


CARD = {
    "type": "object", "additionalProperties": False, "required": ["title", "year"],
    "properties": {"title": {"type": "string"}, "year": {"type": "integer", "minimum": 1800}},
}  # fmt: skip


class Card(pydantic.BaseModel):
    title: str
    year: int = pydantic.Field(ge=1800)
    tags: list[str] = []


def clumsy(body: dict[str, Any]) -> str:
    """A model that reads what was wrong with its first answer."""
    asked = body["messages"][0]["content"] if body["messages"][0]["role"] == "user" else body["messages"][1]["content"]
    if "never" in asked:
        return "I cannot."
    turn = len([m for m in body["messages"] if m["role"] == "user"])
    if "slow" in asked and turn < 3:
        return ("{", '{"title": "T", "year": "x"}')[turn - 1]
    return '```json\n{"title": "T", "year": 1999}\n```' if "fenced" in asked else '{"title": "T", "year": 1999}'


@pytest.mark.parametrize("schema", [CARD, Card], ids=["schema", "pydantic"])
def test_replies_of_a_form_become_typed_columns_and_are_asked_for_again(
    server: Any, tmp_path: Path, schema: Any
) -> None:
    server.answer = saying(clumsy)
    rows = [{"prompt": text} for text in ("plain", "fenced", "slow", "never")]
    for _ in range(2):
        report = Pipeline([Generate(model="m", schema=schema)]).run(rows, client(server, tmp_path), "p")
        made = list(report.rows())
        assert [(row["title"], row["year"]) for row in made] == [("T", 1999)] * 3
        assert all(json.loads(row["response"])["year"] == 1999 for row in made)
        (dropped,) = report.dropped()
        assert dropped["dropped"]["reason"] == "the reply does not fit the schema"
        assert dropped["response"] == "I cannot."
        assert (report.stages[1].requests, report.stages[1].asked_again) == (4 + 2 + 2, 4)
        assert server.paid_lines == 8
    sent = [body for _, body in server.bodies]
    form = sent[0]["response_format"]["json_schema"]
    assert form["strict"] is (schema is CARD)
    assert list(form["schema"]["properties"])[:2] == ["title", "year"]
    (second,) = [b for b in sent if "That cannot be used: year: " in b["messages"][-1]["content"]]
    assert second["messages"][-2] == {"role": "assistant", "content": '{"title": "T", "year": "x"}'}


@pytest.mark.parametrize("how", ["tool", "prompt"])
def test_a_server_without_response_format_is_asked_by_a_tool_or_in_words(server: Any, tmp_path: Path, how: Any) -> None:
    def called(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert "response_format" not in body
        made = chat(body)
        text = '{"title": "T", "year": 1999}'
        if how == "tool":
            function = {"name": body["tool_choice"]["function"]["name"], "arguments": text}
            said = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
            assert body["tools"][0]["function"]["parameters"] == CARD
        else:
            said = {"role": "assistant", "content": text}
            assert json.dumps(CARD) in body["messages"][0]["content"]
        made["choices"][0]["message"] = said
        return 200, made

    server.answer = called
    made = client(server, tmp_path, structured=how)
    report = Pipeline([Generate(model="m", schema=CARD)]).run([{"prompt": "q"}], made, "p")
    (row,) = report.rows()
    assert (row["title"], row["year"], row["prompt"]) == ("T", 1999, [{"role": "user", "content": "q"}])


def test_snowflake_and_a_model_in_this_process_are_asked_as_they_can(tmp_path: Path) -> None:
    asked, wanted = [{"role": "user", "content": "q"}], Generate(schema=CARD).sent
    cortex = CortexSynth(account="a", api="complete", work_dir=tmp_path)
    assert cortex.body("m", asked, wanted)["response_format"] == {"type": "json", "schema": CARD}
    openai = CortexSynth(account="a", work_dir=tmp_path)
    assert openai.body("m", asked, wanted)["response_format"]["type"] == "json_schema"
    here = TransformersSynth(name_or_path="x", work_dir=tmp_path).body(None, asked, wanted)
    assert json.dumps(CARD) in here["messages"][0]["content"]
    assert "response_format" not in here


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"type": "array", "items": {}}, "no object with properties"),
        ({"type": "objct", "properties": {"a": {}}}, "not a valid JSON schema"),
        (dict, "is no pydantic model"),
        ("text", "not str"),
        ({"type": "object", "properties": {"model": {"type": "string"}}}, "has a property 'model'"),
    ],
)
def test_a_form_that_cannot_be_is_said_before_anything_is_sent(given: Any, said: str) -> None:
    ((name, message),) = Generate(model="m", schema=given).check()
    assert name == "schema"
    assert said in message


def test_a_form_never_replaces_a_column_of_the_row(server: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a column 'year' already"):
        Pipeline([Generate(model="m", schema=CARD)]).run([{"prompt": "q", "year": 3}], client(server, tmp_path), "p")
    assert server.paid_lines == 0
