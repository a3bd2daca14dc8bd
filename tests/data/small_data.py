"""Small files of rows, and what becomes of them."""

import json
from pathlib import Path
from typing import Any

from tokens import byte_tokenizer

from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.data.sources import Source
from posttrain.blocks.tokenizers.templates import TEMPLATES

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


LONG = [{"prompt": "q" * 10, "response": "a" * n} for n in (5, 100, 20, 200)]
"""With the template's 42 tokens and the end of the turn: 58, 153, 73 and 253 tokens."""
