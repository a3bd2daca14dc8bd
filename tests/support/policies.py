"""What the tests of reinforcement learning train: rewards, prompts, and a run of a few steps."""

import json
from pathlib import Path
from typing import Any

from posttrain import (
    JSONL,
    AdamW,
    Constant,
    GRPOTrainer,
    HFModel,
    PromptData,
    TransformersSampler,
    reward,
)
from posttrain.blocks.rollouts.ledger import read


@reward("test-share")
def share(prompt: str, reply: str, row: dict[str, Any], *, fail_on: str = "") -> float:
    """The share of one letter, which the row names."""
    if fail_on and row["letter"] in fail_on:
        raise ValueError("no such letter")
    return reply.count(row["letter"]) / max(1, len(reply))


@reward("test-hash")
def digest(prompt: str, reply: str, row: dict[str, Any]) -> float:
    """Noise: a number that depends on every letter."""
    return sum(n * ord(letter) for n, letter in enumerate(reply, start=1)) % 101 / 101


def prompts(folder: Path, letters: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.jsonl"
    rows = [{"prompt": f"say {letter}: {'so ' * n}", "letter": letter} for n, letter in enumerate(letters)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def grpo(folder: Path, model: Path, /, letters: str = "eeee", **keys: Any) -> Any:
    source = prompts(folder.parent / f"{folder.name} data", letters)
    defaults: dict[str, Any] = {
        "max_steps": 2, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(),
        "logger": [JSONL()], "checkpoint": [], "log_every": 1, "rewards": [digest], "accelerator": "cpu",
        "output_dir": folder, "sampler": TransformersSampler(max_new_tokens=8), "group_size": 4,
    }  # fmt: skip
    data = PromptData(sources=[source], eval_sources=[source], cache_dir=folder.parent / "cache")
    network = HFModel(name_or_path=str(model), lora=keys.pop("lora", None))
    return GRPOTrainer(**{"model": network, "data": data, **defaults, **keys})


def replies(folder: Path) -> list[tuple[int, int, list[list[int]]]]:
    return [(line["step"], line["prompt"], [one["ids"] for one in line["replies"]]) for line in read(folder)]
