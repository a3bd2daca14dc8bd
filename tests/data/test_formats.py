"""Rows as other libraries and services write them: each text of a row is in what is trained on, or its loss is said.

The formats are those of OpenAI's fine-tuning, TRL, Axolotl, LLaMA-Factory, ms-swift, Mistral, NeMo, Bedrock, Cohere and
of well-known datasets. Every text is a word of its own, so that it can be looked for.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokens import byte_tokenizer

from posttrain.blocks.data.kinds.preference import PreferenceData
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.tokenizers.templates import TEMPLATES
from posttrain.errors import DataError

RICH = (  # writes all that a conversation may hold
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZERS = {"rich": byte_tokenizer(RICH), "chatml": byte_tokenizer(TEMPLATES["chatml"])}
FUNCTION = {"name": "w-name", "description": "w-description", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "w-name", "arguments": json.dumps({"w-key": "w-value"})}


def ask(text: str = "w-ask") -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str = "w-reply", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def human(text: str = "w-ask") -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: str = "w-reply", **more: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **more}


ROWS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": [{"role": "system", "content": "w-system"}, ask(), reply()]},
    "OpenAI, developer": {"messages": [{"role": "developer", "content": "w-system"}, ask(), reply()]},
    "OpenAI, weights": {"messages": [ask(), reply("w-first", weight=0), ask("w-again"), reply(weight=1)]},
    "OpenAI, parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "w-ask"}]}, reply()]},
    "OpenAI, an image": {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "w-ask"}, {"type": "image_url", "image_url": {"url": "w-image"}}]}, reply()]},
    "OpenAI, tools": {
        "messages": [ask(), {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
                     {"role": "tool", "tool_call_id": "1", "content": "w-result"}, reply()],
        "tools": [{"type": "function", "function": FUNCTION}], "parallel_tool_calls": False,
    },
    "OpenAI, functions": {
        "messages": [ask(), {"role": "assistant", "content": None, "function_call": CALL},
                     {"role": "function", "name": "w-name", "content": "w-result"}, reply()],
        "functions": [FUNCTION],
    },
    "OpenAI, a refusal": {"messages": [ask(), {"role": "assistant", "content": None, "refusal": "w-refusal"}]},
    "Anthropic, tool use": {"messages": [ask(), {"role": "assistant", "content": [
        {"type": "text", "text": "w-reply"}, {"type": "tool_use", "id": "1", "name": "w-name", "input": {}}]}], "system": "w-system"},
    "Bedrock": {"system": [{"text": "w-system"}], "messages": [{"role": "user", "content": [{"text": "w-ask"}]}, {"role": "assistant", "content": [{"text": "w-reply"}]}]},
    "Gemini": {"systemInstruction": {"parts": [{"text": "w-system"}]}, "contents": [{"role": "user", "parts": [{"text": "w-ask"}]}]},
    "Cohere": {"messages": [{"role": "System", "content": "w-system"}, {"role": "User", "content": "w-ask"}, {"role": "Chatbot", "content": "w-reply"}]},
    "Mistral": {"messages": [ask(), reply("", tool_calls=[{"id": "1", "function": CALL}]), {"role": "tool", "name": "w-name", "content": "w-result", "tool_call_id": "1"}, reply()]},
    "TRL, prompt and completion": {"prompt": [ask()], "completion": [reply()]},
    "TRL, text": {"text": "w-text"},
    "TRL, tools": {"messages": [ask(), reply(tool_calls=[{"function": CALL}])], "tools": json.dumps([FUNCTION])},
    "TRL, unpaired": {"prompt": "w-ask", "completion": "w-reply", "label": True},
    "TRL, unpaired, bad": {"prompt": "w-ask", "completion": "w-reply", "label": False},
    "TRL, preference": {"prompt": "w-ask", "chosen": "w-reply", "rejected": "w-bad"},
    "TRL, images": {"messages": [ask(), reply()], "images": [{"path": "w-image"}]},
    "TRL, stepwise": {"prompt": "w-ask", "completions": ["w-one", "w-two"], "labels": [True, False]},
    "TRL, thinking": {"messages": [ask(), reply(thinking="w-thought")]},
    "Axolotl, train": {"messages": [ask(), reply("w-first", train=False), ask("w-again"), reply(train=True)]},
    "Axolotl, training": {"conversations": [human(), gpt("w-first", training=False), human("w-again"), gpt()]},
    "Axolotl, role and value": {"conversations": [{"role": "user", "value": "w-ask"}, {"role": "assistant", "value": "w-reply"}]},
    "Axolotl, segments": {"segments": [{"label": True, "text": "w-text"}]},
    "Axolotl, reasoning": {"messages": [ask(), reply(reasoning_content="w-thought")]},
    "Axolotl, system": {"system": "w-system", "instruction": "w-ask", "input": "w-input", "output": "w-reply"},
    "Axolotl, context": {"article": "w-article", "question": "w-ask", "answer": "w-reply"},
    "LLaMA-Factory, alpaca": {"instruction": "w-ask", "input": "w-input", "output": "w-reply", "system": "w-system", "history": [["w-q", "w-a"]]},
    "LLaMA-Factory, images": {"instruction": "w-ask", "output": "w-reply", "images": ["w-image"]},
    "LLaMA-Factory, kto": {"instruction": "w-ask", "input": "", "output": "w-reply", "kto_tag": True},
    "LLaMA-Factory, sharegpt": {
        "conversations": [human(), {"from": "function_call", "value": json.dumps({"name": "w-name", "arguments": {"w-key": "w-value"}})},
                          {"from": "observation", "value": "w-result"}, gpt()],
        "system": "w-system", "tools": json.dumps([FUNCTION]),
    },
    "LLaMA-Factory, preference": {"conversations": [human()], "chosen": gpt(), "rejected": gpt("w-bad")},
    "ms-swift": {"system": "w-system", "query": "w-ask", "response": "w-reply", "history": [["w-q", "w-a"]]},
    "ms-swift, messages": {"messages": [ask(), {"role": "tool_call", "content": json.dumps({"name": "w-name", "arguments": {}})},
                                        {"role": "tool_response", "content": "w-result"}, reply(loss=True)]},
    "ms-swift, preference": {"messages": [ask(), reply()], "rejected_response": "w-bad"},
    "NeMo": {"system": "w-system", "mask": "User", "conversations": [{"from": "User", "value": "w-ask"}, {"from": "Assistant", "value": "w-reply"}]},
    "Dolly": {"instruction": "w-ask", "context": "w-input", "response": "w-reply", "category": "w-category"},
    "OpenOrca": {"id": "w-id", "system_prompt": "w-system", "question": "w-ask", "response": "w-reply"},
    "ultrachat": {"prompt": "w-prompt", "prompt_id": "w-id", "messages": [ask(), reply()]},
    "ultrafeedback": {"prompt": "w-ask", "chosen": [ask(), reply()], "rejected": [ask(), reply("w-bad")], "score_chosen": 9.0},
    "a thought under another name": {"messages": [ask(), reply(thought="w-thought")]},
    "HelpSteer": {"prompt": "w-ask", "response": "w-reply", "helpfulness": 4},
    "hh-rlhf": {"chosen": "\n\nHuman: w-ask\n\nAssistant: w-reply", "rejected": "\n\nHuman: w-ask\n\nAssistant: w-bad"},
    "OpenAI, preference": {"input": {"messages": [ask()], "tools": [{"type": "function", "function": FUNCTION}]},
                           "preferred_output": [reply()], "non_preferred_output": [reply("w-bad")]},
}  # fmt: skip


def words(value: Any, column: str) -> Iterator[tuple[str, str]]:
    """Every word of a value, with its column, or its key in a message."""
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            inner = None
        if isinstance(inner, dict | list):
            yield from words(inner, column)
        else:
            yield from ((word, column) for word in value.split() if word.startswith("w-"))
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = (
                f"{column}.{key}" if column in ("messages", "conversations") and item != value.get("role") else column
            )
            yield from words(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from words(item, column)


def assert_nothing_is_lost(name: str, tokenizer: Any) -> bool:
    """Whether the row is trained on; if so, all of it is there, and no more than the replies are trained."""
    row = ROWS[name]
    pairs = any(column in row for column in ("chosen", "preferred_output", "rejected_response"))
    data: Any = (PreferenceData if pairs else SFTData)(sources=["x.jsonl"])
    encoder = data.encoder(tokenizer)
    try:
        (encoded,) = encoder.encode([row])
    except DataError as error:
        assert all(column in str(error) for column in row)  # it names every column
        return False
    if isinstance(encoded, Refused):
        assert str(encoded)
        return False
    trained = "".join(tokenizer.decode(ids[mask].tolist()) for ids, mask in encoded.documents)
    assert "w-reply" in trained and not any(word in trained for word in ("w-ask", "w-system", "w-result", "w-first"))
    text = "".join(tokenizer.decode(ids.tolist()) for ids, _ in encoded.documents)
    unused = set(encoder.reading.summary()["unused"])
    lost = [
        word for column in row for word, place in words(row[column], column)
        if word not in text and not unused & {place, column}
    ]  # fmt: skip
    assert not lost
    return True


@pytest.mark.parametrize("template", TOKENIZERS)
@pytest.mark.parametrize("name", ROWS)
def test_every_text_of_a_row_is_in_what_is_trained_on_or_its_loss_is_said(name: str, template: str) -> None:
    assert_nothing_is_lost(name, TOKENIZERS[template])


TRL = importlib.util.find_spec("trl")
SHIPPED = sorted(Path(str(TRL.origin)).parent.glob("chat_templates/*.jinja")) if TRL else []
"""Templates of some thirty families of models, as their makers wrote them."""


@pytest.mark.skipif(not SHIPPED, reason="TRL (extra `bench`), whose chat templates are tried, is not installed")
def test_nothing_is_lost_with_the_templates_that_trl_ships() -> None:
    trained = 0
    for file in SHIPPED:
        jinja = file.read_text(encoding="utf-8")
        special = {*re.findall(r"<\|[^<>\s|]+\|>|<end_of_turn>|<end_of_utterance>", jinja), "</s>", "<|pad|>"}
        ends = (token for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>") if token in special)
        tokenizer = byte_tokenizer(jinja, sorted(special), next(ends, "</s>"))
        trained += sum(assert_nothing_is_lost(name, tokenizer) for name in ROWS)
    assert trained > 20 * len(SHIPPED)


REFUSED = {
    "OpenAI, an image", "OpenAI, a refusal", "Anthropic, tool use", "Gemini", "TRL, text", "TRL, unpaired, bad", "TRL, images",
    "TRL, stepwise", "Axolotl, segments", "LLaMA-Factory, images",
}  # fmt: skip
"""What no template can show as text, and what is not one reply to learn."""


@pytest.mark.parametrize("name", ROWS)
def test_all_that_is_text_can_be_trained_on_with_a_template_that_shows_all(name: str) -> None:
    row = ROWS[name]
    pairs = any(column in row for column in ("chosen", "preferred_output", "rejected_response"))
    data: Any = (PreferenceData if pairs else SFTData)(sources=["x.jsonl"])
    try:
        (encoded,) = data.encoder(TOKENIZERS["rich"]).encode([row])
    except DataError:
        encoded = Refused("no schema")
    assert isinstance(encoded, Refused) == (name in REFUSED)
    if not isinstance(encoded, Refused):
        decode = TOKENIZERS["rich"].decode
        trained = [decode(ids[mask].tolist()) for ids, mask in encoded.documents]
        assert "w-reply" in trained[0] and ("w-bad" in trained[-1]) == pairs
        assert not any(word in trained[0] for word in ("w-ask", "w-system", "w-result", "w-first"))


def test_null_arguments_that_a_table_fills_in_are_not_trained_on(tmp_path: Path) -> None:
    """All objects of a parquet column have the same keys: one tool's arguments get those of another, as nulls."""
    import datasets

    def call(**arguments: Any) -> dict[str, Any]:
        return {"messages": [ask(), reply("", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])]}

    datasets.Dataset.from_list([call(city="Rome"), call(days=2)]).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list([call(city="Rome"), call(days=2)]).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        train = SFTData(sources=[str(tmp_path / name)]).prepare(TOKENIZERS["rich"]).train
        found = [TOKENIZERS["rich"].decode(ids[mask].tolist()) for ids, mask in (train[n].documents[0] for n in (0, 1))]
        assert found == ['f{"city": "Rome"}<|im_end|>', 'f{"days": 2}<|im_end|>']
