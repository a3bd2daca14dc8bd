"""What the loop's tests train on: random documents and pairs in memory, and a tiny Llama made from a configuration."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.blocks.data.loader import MapLoader, StreamLoader
from posttrain.blocks.layout import Column, Document, Example, collate_pairs
from posttrain.blocks.loggers.logger import JSONL
from posttrain.blocks.models.model import HFModel, RewardModel
from posttrain.blocks.models.speculator.model import SpeculatorModel
from posttrain.blocks.models.swiftkv.model import SwiftKVModel
from posttrain.blocks.optimizer import AdamW
from posttrain.interfaces import Loaders
from posttrain.registry import block
from posttrain.trainer import Trainer
from posttrain.trainers.dpo import DPOTrainer
from posttrain.trainers.mlp_speculator import SpeculatorTrainer
from posttrain.trainers.reward import RewardTrainer
from posttrain.trainers.sft import SFTTrainer
from posttrain.trainers.swiftkv import SwiftKVTrainer

VOCABULARY = 97
MARGINS = {"margins": Column("example")}
"""What toy pairs carry."""
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def document(seed: int) -> Document:
    """A document is a function of its number: a start, and each next token the last one times 3 plus 1."""
    random = np.random.default_rng(seed)
    ids = [int(random.integers(3, VOCABULARY))]
    for _ in range(int(random.integers(3, 40))):
        ids.append((ids[-1] * 3 + 1) % (VOCABULARY - 1) + 1)  # never the padding
    mask = random.random(len(ids)) < 0.7
    mask[-1] = True
    return np.array(ids, dtype=np.int64), mask


def example(seed: int) -> Example:
    """A document by itself."""
    return Example((document(seed),))


def pair(seed: int) -> Example:
    """Two replies to one prompt; the chosen one goes on counting up, the rejected one is random."""
    random = np.random.default_rng(seed)
    prompt = random.integers(3, VOCABULARY, int(random.integers(2, 20)))
    sizes = random.integers(2, 20, 2)
    chosen = (prompt[-1] + 1 + np.arange(sizes[0])) % (VOCABULARY - 1) + 1
    rejected = random.integers(3, VOCABULARY, sizes[1])
    sides = [np.concatenate([prompt, reply]) for reply in (chosen, rejected)]
    return Example(tuple((ids, np.arange(len(ids)) >= len(prompt)) for ids in sides), {"margins": seed % 3 / 2})


class InMemory:
    """Examples as the loaders know them."""

    def __init__(
        self, seeds: range, weights: tuple[float, ...] = (1.0,), make: Callable[[int], Example] = example
    ) -> None:
        self.examples = [make(seed) for seed in seeds]
        self.lengths = np.array([len(found) for found in self.examples], dtype=np.int32)
        self.source = np.arange(len(seeds), dtype=np.int16) % len(weights)
        self.weights = list(weights)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class Numbers:
    """A stream of row numbers, whose state is how many were read."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def read(self, epoch: int, state: dict[str, Any] | None) -> Any:
        for number in range(state["read"] if state else 0, self.rows):
            yield number, 0, {"read": number + 1}


@block("data", "toy")
class ToyData:
    """Random documents; 4 rows of 64 tokens hold about 12 of them."""

    rows: int = 100
    eval_rows: int = 0
    packing: bool = True
    streaming: bool = False
    pairs: bool = False

    def build(self, tokenizer: Any, micro_batch_size: int, rank: int, world_size: int, seed: int) -> Loaders:
        shape: dict[str, Any] = {
            "max_length": 64, "packing": self.packing, "micro_batch_size": micro_batch_size, "rank": rank,
            "world_size": world_size, "seed": seed,
        }  # fmt: skip
        make = pair if self.pairs else example
        if self.pairs:
            shape |= {"max_length": 128, "collate": partial(collate_pairs, packing=self.packing, columns=MARGINS)}
        if self.streaming:
            train: Any = StreamLoader(
                stream=Numbers(self.rows),
                encode=lambda rows, _: [make(row) for row, _ in rows],
                window=30,
                **shape,
            )
        else:
            train = MapLoader(examples=InMemory(range(self.rows), make=make), **shape)
        held_out = InMemory(range(10_000, 10_000 + self.eval_rows), make=make)
        return Loaders(train=train, eval=MapLoader(examples=held_out, **shape) if self.eval_rows else None)


@block("tokenizer", "toy")
class ToyTokenizer:
    """Nothing to tokenize; exported as nothing."""

    pad_token_id: int = 0

    def build(self, model: Any) -> Any:
        return self

    def save_pretrained(self, folder: Path) -> None:
        """Nothing."""


def network(block: type = HFModel, **keys: Any) -> Any:
    """A model block from a configuration alone."""
    config = {**LLAMA, **keys.pop("config", {})}
    return block(**{"name_or_path": "toy", "random_init": True, "config": config, **keys})


def trainer(folder: Path, method: type[Trainer] = SFTTrainer, **keys: Any) -> Any:
    """Four rows a step on one CPU process; every step is logged as it ends."""
    model = keys.pop("model", {})
    pairs = issubclass(method, DPOTrainer | RewardTrainer)
    data = {"pairs": pairs} | {
        name: keys.pop(name) for name in ("rows", "eval_rows", "packing", "streaming") if name in keys
    }
    defaults: dict[str, Any] = {
        "tokenizer": ToyTokenizer(), "optimizer": AdamW(lr=1e-3), "output_dir": folder, "accelerator": "cpu",
        "logger": [JSONL()], "log_every": 1, "max_steps": 8, "micro_batch_size": 4,
    }  # fmt: skip
    block = {RewardTrainer: RewardModel, SwiftKVTrainer: SwiftKVModel, SpeculatorTrainer: SpeculatorModel}.get(
        method, HFModel
    )
    made = network(block, **model)
    return method(model=made, data=ToyData(**data), **{**defaults, **keys})


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gb", "time")} for line in lines]


def losses(folder: Path) -> list[float]:
    """Return the loss of every step."""
    return [line["loss"] for line in metrics(folder) if "loss" in line]
