"""A whole method of somebody's own needs no help from the library's inside: the doors that a trainer may use.

It takes what methods of all kinds need: columns of rows, batches that `made` makes, terms with counts, several updates,
evaluations of its own.
"""

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from toy import metrics

from posttrain import (
    JSONL,
    AdamW,
    Batch,
    Constant,
    HFModel,
    PromptData,
    Term,
    Trainer,
    TransformersSampler,
    block,
    default,
)
from posttrain.blocks.layout import Column, Example, collate
from posttrain.interfaces import DataBlock, ModelBlock, SamplerBlock


@block("trainer", "best-of-n")
class BestOfN(Trainer):
    """Trains on the reply that says a letter most often, and keeps its entropy up."""

    model: ModelBlock = default(HFModel, required=True)
    data: DataBlock = default(PromptData, required=True)
    sampler: SamplerBlock = attrs.field(factory=lambda: TransformersSampler(max_new_tokens=8))
    n: int = 4
    updates: int = 1

    @property
    def updates_per_step(self) -> int:  # type: ignore[override]
        return self.updates

    def said(self, batch: Batch, n: int) -> list[tuple[list[int], list[int], float]]:
        """Return each prompt, its best reply, and what share of it is the letter that the row names."""
        run, prompts = self.run, [ids for _, ids, _ in batch.documents()]
        keys: list[tuple[int, ...]] = [(self.seed, run.step, *ids[-8:]) for ids in prompts]
        found = []
        for ids, replies, row in zip(
            prompts, self.sampler.build(run).sample(prompts, keys, n), batch["row"], strict=True
        ):
            texts = [run.tokenizer.decode(reply.ids) for reply in replies]
            shares = [text.count(row["letter"]) / len(text) for text in texts]
            best = int(np.argmax(shares))
            found.append((ids, replies[best].ids, shares[best]))
        return found

    def made(self, batches: list[Batch]) -> list[Batch]:
        return [self.run.to_device(self.laid(self.said(batch, self.n))) for batch in batches]

    def laid(self, said: list[tuple[list[int], list[int], float]]) -> Batch:
        examples = [
            Example(((np.array(ids + reply), np.arange(len(ids + reply)) >= len(ids)),), {"share": share})
            for ids, reply, share in said
        ]
        batch = collate([[one] for one in examples], columns={"share": Column("example")})
        return batch.but(counted={"prompts": len(said)})

    def loss(self, batch: Batch) -> dict[str, Term]:
        log_probs, entropy = self.run.model(batch, "policy")
        self.run.log(share=Term(batch["share"].sum(), "prompts"))
        return {"nll": Term(-log_probs.sum()), "entropy": Term(entropy.sum(), "supervised_tokens", -0.01)}

    def step(self, batches: list[Batch]) -> torch.Tensor:
        return [self.update(batches) for _ in range(self.updates)][-1]

    def measured(self, batch: Batch) -> dict[str, Any]:
        return {"share": Term(torch.tensor(sum(share for *_, share in self.said(batch, 1))), "weight", 0.0)}


def best(folder: Path, model: Path, **keys: Any) -> Any:
    file = folder.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "so " * n, "letter": "e"}) + "\n" for n in range(1, 5)))
    defaults: dict[str, Any] = {
        "max_steps": 2, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(), "logger": [JSONL()],
        "checkpoint": [], "log_every": 1, "accelerator": "cpu", "output_dir": folder,
    }  # fmt: skip
    data = PromptData(sources=[file], eval_sources=[file], cache_dir=folder.parent / "cache")
    return BestOfN(model=HFModel(name_or_path=str(model)), data=data, **{**defaults, **keys})


@pytest.mark.parametrize("updates", [1, 3])
def test_the_curve_does_not_depend_on_the_cut(tmp_path: Path, tiny_model: Path, updates: int) -> None:
    for micro, parts in ((4, 1), (2, 2), (1, 4)):
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": parts}
        best(tmp_path / str(micro), tiny_model, **cut, updates=updates, eval_every=1).train()
        for one, other in zip(metrics(tmp_path / "4"), metrics(tmp_path / str(micro)), strict=True):
            assert one == pytest.approx(other, abs=2e-5, rel=1e-4), micro


def test_it_learns(tmp_path: Path, tiny_model: Path) -> None:
    run = best(tmp_path / "run", tiny_model, max_steps=25, optimizer=AdamW(lr=1e-2), n=16, eval_every=25).train()
    assert run.last["eval_share"] > 0.3
    assert "eval_loss" not in run.last  # it measures shares, no loss
