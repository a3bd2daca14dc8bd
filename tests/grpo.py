"""Group-relative policy optimization as user code: what a method of one's own needs of posttrain, and no more.

A port of a sketch that was written before there were terms, made batches and groups; test_method.py holds it.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from posttrain import Batch, HFModel, SFTData, Term, Trainer, block, default
from posttrain.blocks.data.data import pad_id
from posttrain.blocks.data.encode import tokenize, tokenizer_text
from posttrain.blocks.data.rows.schemas import Reading
from posttrain.blocks.layout import Column, Example, collate, collate_groups
from posttrain.blocks.models.frozen import reference_of
from posttrain.interfaces import DataBlock, ModelBlock

COLUMNS = {"advantages": Column("target"), "sampled": Column("target")}
REWARDS: dict[str, Callable[[str, dict[str, Any]], float]] = {}


def reward(name: str) -> Callable[[Any], Any]:
    """Name a function of a reply and of the columns of the prompt's row."""
    return lambda function: REWARDS.__setitem__(name, function) or function


@attrs.define
class PromptEncoder:
    """Prompts as tokens, nothing of which is supervised; their rows come along."""

    tokenizer: Any
    reading: Reading = attrs.field(factory=Reading)
    sides = ("",)
    columns = {"row": Column("example", "json")}

    def encode(self, rows: list[Any]) -> list[Any]:
        found = [np.array(one.ids) for one in tokenize(self.tokenizer, [row["text"] for row in rows])]
        return [Example(((ids, ids < 0),), {"row": row}) for ids, row in zip(found, rows, strict=True)]

    def fingerprint(self) -> str:
        return f"prompts {tokenizer_text(self.tokenizer)}"


@block("data", "prompts")
class Prompts(SFTData):
    """Rows with a `text` each, whose other columns reach the rewards."""

    packing: bool = False

    def encoder(self, tokenizer: Any) -> Any:
        return PromptEncoder(tokenizer)

    def collator(self, tokenizer: Any) -> Any:
        def made(rows: Any, multiple: int) -> Batch:
            batch = collate(rows, multiple, pad_id=pad_id(tokenizer), columns=PromptEncoder.columns)
            return batch.but(weight=len(rows))

        return made


@attrs.frozen(eq=False)
class Reply:
    """What the network said."""

    ids: list[int]
    log_probs: list[float]


@attrs.frozen(kw_only=True, slots=False)
class InProcess:
    """Samples from the network in training; the draws of a reply are a function of its key alone."""

    max_new_tokens: int = 8
    temperature: float = 1.0

    def sample(self, run: Any, prompts: list[list[int]], keys: list[list[int]], n: int) -> list[list[Reply]]:
        network, training = run.model.module.base, run.model.module.training
        run.model.module.eval()
        with torch.no_grad(), run.fabric.autocast():
            found = self._continued(network, prompts, keys, n)
        run.model.module.train(training)
        return found

    def _continued(self, network: Any, prompts: Any, keys: Any, n: int) -> list[list[Reply]]:
        width, end = max(map(len, prompts)), network.generation_config.eos_token_id
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
        cache = DynamicCache(config=network.config)
        draws = [np.random.default_rng([*k, i]).random(self.max_new_tokens) for k in keys for i in range(n)]
        uniform, rows = torch.tensor(np.array(draws)), len(prompts) * n
        places, asked = (mask.cumsum(-1) - 1).clamp(min=0), partial(network, past_key_values=cache, use_cache=True)
        logits = asked(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(n)
        logits, mask = (x.repeat_interleave(n, 0) for x in (logits, mask))
        alive, said = torch.arange(rows), [Reply([], []) for _ in range(rows)]
        for t in range(self.max_new_tokens):
            log_probs = (logits.float() / self.temperature).log_softmax(-1)
            sums = log_probs.double().exp().cumsum(-1)
            token = torch.searchsorted(sums, uniform[alive, t, None] * sums[:, -1:], right=True)
            token = token.clamp(max=sums.shape[1] - 1)
            values = log_probs.gather(1, token)[:, 0].tolist()
            for i, one, value in zip(alive.tolist(), token[:, 0].tolist(), values, strict=True):
                said[i].ids.append(one), said[i].log_probs.append(value)
            keep = (token[:, 0] != end).nonzero()[:, 0]
            if not len(keep) or t + 1 == self.max_new_tokens:
                break
            alive, token, mask = alive[keep], token[keep], F.pad(mask[keep], (0, 1), value=1)
            cache.batch_select_indices(keep)
            logits = asked(input_ids=token, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1).logits[
                :, -1
            ]
        return [said[i : i + n] for i in range(0, rows, n)]


def clipped(new: Tensor, old: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.28) -> Tensor:
    """Return the loss of each token (DAPO, arXiv:2503.14476)."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


@block("trainer", "grpo-sketch")
class GRPOTrainer(Trainer):
    """Samples groups of replies to prompts, scores them, and raises the probability of the better ones."""

    model: ModelBlock = default(HFModel, required=True)
    data: DataBlock = default(Prompts, required=True)
    sampler: InProcess = attrs.field(factory=InProcess)
    rewards: dict[str, float] = attrs.field(factory=dict)
    group_size: int = 8
    over: Literal["supervised_tokens", "replies"] = "supervised_tokens"
    beta: float = 0.0
    updates: int = 1
    branching: bool = True

    @property
    def updates_per_step(self) -> int:  # type: ignore[override]
        return self.updates

    def build_frozen(self, fabric: Any, model: Any) -> Any:
        frozen = super().build_frozen(fabric, model)
        return frozen | {"reference": reference_of(model, fabric)} if self.beta else frozen

    def score(self, text: str, row: dict[str, Any]) -> float:
        try:
            return sum(weight * float(REWARDS[name](text, row)) for name, weight in self.rewards.items())
        except Exception:  # counted as a failure
            return math.nan

    def rollouts(self, batch: Batch, n: int) -> list[tuple[list[int], list[Reply], Tensor]]:
        """Return each prompt with its replies and their rewards."""
        run, prompts = self.run, [ids for _, ids, _ in batch.documents()]
        keys = [[self.seed, run.step, zlib.crc32(np.array(ids).tobytes())] for ids in prompts]
        said = self.sampler.sample(run, prompts, keys, n)
        return [
            (ids, replies, torch.tensor([self.score(run.tokenizer.decode(r.ids), row) for r in replies]))
            for ids, replies, row in zip(prompts, said, batch["row"], strict=True)
        ]

    def made(self, batches: list[Batch]) -> list[Batch]:
        found = [self.run.to_device(self.packed(self.rollouts(batch, self.group_size))) for batch in batches]
        with torch.no_grad():
            return found if self.updates == 1 else [b.but(old=self.log_probs(self.run.model, b)) for b in found]

    def packed(self, groups: list[tuple[list[int], list[Reply], Tensor]]) -> Batch:
        """Return the micro-batch of some groups."""
        examples = []
        for prompt, replies, rewards in groups:
            centred = (rewards - rewards.nanmean()).nan_to_num(0)
            advantages = centred / (centred.square().sum() / max(1, len(replies) - 1)).sqrt().add(1e-4)
            texts = [np.array(prompt + r.ids) for r in replies]
            known, values = len(prompt), [[0.0] * len(prompt) + r.log_probs for r in replies]
            examples.append(Example(
                tuple((ids, np.arange(len(ids)) >= known) for ids in texts),
                {"advantages": tuple(np.full(len(ids), a) for ids, a in zip(texts, advantages.tolist(), strict=True)),
                 "sampled": tuple(map(np.array, values))},
            ))  # fmt: skip
        batch = collate_groups([examples], pad_id=pad_id(self.run.tokenizer), packing=self.branching, columns=COLUMNS)
        every = torch.cat([rewards for *_, rewards in groups])
        counted = {"replies": len(every), "groups": len(groups)}
        flat = sum(rewards.nan_to_num(0).unique().numel() == 1 for *_, rewards in groups)
        return batch.but(
            counted=counted,
            reward=every.nan_to_num(0).sum(),
            failed=every.isnan().sum(),
            flat=torch.tensor(float(flat)),
        )

    def log_probs(self, model: Any, batch: Batch) -> Tensor:
        return model(batch, "log_probs", temperature=self.sampler.temperature)

    def loss(self, batch: Batch) -> dict[str, Term]:
        new = self.log_probs(self.run.model, batch)
        old = batch.get("old", new.detach())
        losses = clipped(new, old, batch["advantages"])
        if self.over == "replies":
            losses = losses / batch["lengths"][batch["document"]]
        self.run.log(
            reward=Term(batch["reward"], "replies"), failed=Term(batch["failed"], "replies"),
            flat=Term(batch["flat"], "groups"),
            off=Term(((new.detach() - old).exp() - 1).abs().sum(), "supervised_tokens"),
            gap=Term((old - batch["sampled"]).abs().sum(), "supervised_tokens"),
        )  # fmt: skip
        terms = {"policy": Term(losses.sum(), self.over)}
        if self.beta:
            gap = self.log_probs(self.run.frozen["reference"], batch) - new
            terms["kl"] = Term((gap.exp() - 1 - gap).sum(), "supervised_tokens", self.beta)
        return terms

    def step(self, batches: list[Batch]) -> Tensor:
        losses = [self.update(batches) for _ in range(self.updates)]
        return losses[-1]

    def measured(self, batch: Batch) -> dict[str, Any]:
        rewards = torch.cat([rewards for *_, rewards in self.rollouts(batch, 1)])
        return {"reward": Term(rewards.nan_to_num(0).sum(), "weight", 0.0)}
