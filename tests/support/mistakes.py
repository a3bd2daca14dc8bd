"""Code of users who each made one mistake, for `posttrain check --twin` to find."""

import os
from typing import Any

import attrs
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from posttrain import Batch, DPOTrainer, SFTTrainer, after, before, block
from posttrain.blocks.models.frozen import WithoutAdapters
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.optimizer import torch_optimizer


@block("trainer", "sound")
class Sound(SFTTrainer):
    """No mistake: a focal loss."""

    def loss(self, batch: Batch) -> Any:
        log_probs = self.run.model(batch, "log_probs")
        return -((1 - log_probs.exp()) ** 2 * log_probs).sum() / batch["weight"]


@block("trainer", "sum")
class Sum(SFTTrainer):
    """The sum, where a mean is asked for: a micro-batch with more tokens counts twice as more."""

    def loss(self, batch: Batch) -> Any:
        return self.run.model(batch)


@block("trainer", "document-mean")
class DocumentMean(SFTTrainer):
    """Divides by documents, while micro-batches are weighed by tokens."""

    def loss(self, batch: Batch) -> Any:
        return self.run.model(batch) / (len(batch["cu_seqlens"]) - 1)


@block("model", "convolved")
class Convolved(HFModel):
    """Each token sees the one to its left, also where that ends another document."""

    def wrap(self, hf: Any) -> Any:
        hf.model.layers[0].register_forward_hook(lambda m, args, out: out + functional.pad(out[:, :-1], (0, 0, 1, 0)))
        return super().wrap(hf)


@block("trainer", "by-rank")
class ByRank(SFTTrainer):
    """The first rank counts twice."""

    def loss(self, batch: Batch) -> Any:
        return super().loss(batch) * (2 if self.run.fabric.world_size > 1 and self.run.fabric.is_global_zero else 1)


@block("trainer", "not-on-rank-one")
class NotOnRankOne(SFTTrainer):
    """Fails on the second rank."""

    def loss(self, batch: Batch) -> Any:
        if self.run.fabric.global_rank == 1:
            raise ValueError("not on rank one")
        return super().loss(batch)


@block("trainer", "aborts")
class Aborts(SFTTrainer):
    """The second rank is killed by its own library."""

    def loss(self, batch: Batch) -> Any:
        if self.run.fabric.global_rank == 1:
            os.abort()
        return super().loss(batch)


@block("trainer", "raises")
class Raises(SFTTrainer):
    """Does not run."""

    def loss(self, batch: Batch) -> Any:
        return 1 / 0


@block("trainer", "other-reference")
class OtherReference(DPOTrainer):
    """The reference is asked at another temperature than the policy."""

    def log_probs(self, batch: Batch) -> Any:
        ours, theirs = super().log_probs(batch)
        return ours, theirs * 0.9


@block("model", "louder")
class Louder(HFModel):
    """What a hook on the model does to it is not exported."""

    def wrap(self, hf: Any) -> Any:
        hf.model.norm.register_forward_hook(lambda module, args, output: output * 2)
        return super().wrap(hf)


def all_that_came_before(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any) -> Any:
    """Attention over the whole row; q [rows, heads, width, size]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


@block("model", "sees-all")
class SeesAll(HFModel):
    """Its attention does not know where a document begins."""

    def wrap(self, hf: Any) -> Any:
        AttentionInterface.register("sees-all", all_that_came_before)
        AttentionMaskInterface.register("sees-all", lambda *args, **more: None)
        hf.set_attn_implementation("sees-all")
        return super().wrap(hf)


@block("model", "rounded")
class Rounded(HFModel):
    """The angles of positions are rounded, as all of a network is by `module.to(torch.bfloat16)`."""

    def wrap(self, hf: Any) -> Any:
        angles = hf.model.rotary_emb
        angles.inv_freq = angles.inv_freq.bfloat16().float()
        return super().wrap(hf)


@block("trainer", "other-beginning")
class OtherBeginning(DPOTrainer):
    """Takes the model without its adapters for the reference, though they begin with a part of the weights."""

    def build_frozen(self, fabric: Any, model: Any) -> Any:
        return {"reference": WithoutAdapters(model, fabric)}


@block("callback", "own-rate")
class OwnRate:
    """Lowers the learning rate by a count of its own."""

    seen: list[None] = attrs.field(factory=list, init=False)

    @before("trainer.step")
    def lower(self, trainer: Any, batches: Any) -> None:
        self.seen.append(None)
        for group in torch_optimizer(trainer.run.optimizer).param_groups:
            group["lr"] = 1e-3 / len(self.seen)


@block("callback", "forgetful")
class Forgetful:
    """Doubles the loss of every third step, and counts the steps by itself."""

    seen: list[None] = attrs.field(factory=list, init=False)

    @after("trainer.loss")
    def double(self, trainer: Any, loss: Any) -> Any:
        self.seen.append(None)
        return loss * 2 if len(self.seen) % 3 == 0 else loss


@block("callback", "misspelt")
class Misspelt:
    """Hooks onto a method that is not there."""

    @before("trainer.lose")
    def look(self, trainer: Any, batch: Batch) -> None:
        """Nothing."""
