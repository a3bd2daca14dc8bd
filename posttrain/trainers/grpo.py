"""Reinforcement learning from groups of replies: GRPO and its relatives (`posttrain/blocks/losses/policy.py`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import ge, gt, le, optional

from posttrain.batch import Batch, Extra, Term
from posttrain.blocks.losses import policy  # noqa: F401 - registers the losses
from posttrain.blocks.losses.surrogate import (
    Advantage,
    Correction,
    Kind,
    Replies,
    Surrogate,
    bounded,
    correction,
    divergence_from,
)
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.rollouts.engines.vllm import VllmSampler
from posttrain.blocks.rollouts.gap import GAP, gap_of
from posttrain.blocks.rollouts.prompts import PromptData
from posttrain.blocks.rollouts.sampler import TransformersSampler
from posttrain.errors import TrainingError
from posttrain.interfaces import DataBlock, EnvironmentBlock, Loaders, ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainers.rewarded import RewardedTrainer

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor

    from posttrain.blocks.rollouts.ahead import Fetch
    from posttrain.blocks.rollouts.scored import Scored
    from posttrain.run import Run


@block("trainer", "grpo")
class GRPOTrainer(RewardedTrainer):
    """Group relative policy optimization: the model answers each prompt several times, rewards score the replies, and
    the better ones of each group become likelier."""

    model: ModelBlock = default(HFModel, required=True)
    group_size: int = key(8, check=gt(0), also=("num_generations",))
    """Replies to each prompt."""
    loss_type: str = "dapo"
    """grpo, dr_grpo, dapo, bnpo, gspo, cispo, sapo, ppo (reinforce_plus_plus), reinforce, rloo, or one of your own by
    `@policy_loss`. The functions and their sources are in `posttrain/blocks/losses/policy.py`."""
    advantage: Advantage | None = None
    """group (reward less the mean of its group), group_std (also over the group's standard deviation), batch_std (over
    that of the step), leave_one_out, batch (mean and standard deviation of the step). By default what the loss's paper
    has."""
    clip_low: float | None = key(None, check=optional(gt(0)), also=("epsilon",))
    """How far the ratio to the policy that sampled may fall below 1. By default the loss's own."""
    clip_high: float | None = key(None, check=optional(gt(0)), also=("epsilon_high",))
    """How far it may rise above 1. By default the loss's own."""
    loss_args: dict[str, float] = attrs.field(factory=dict)
    """Further options of the loss: `delta`, the upper bound of the ratio where the advantage is negative (two-sided
    clipping); `tau_positive` and `tau_negative` of sapo."""
    environment: EnvironmentBlock | None = None
    """Answers the policy after each of its turns, until the conversation ends: `type: tools`, or one of your own. By
    default a reply is one turn."""
    resample: int = key(0, check=ge(0))
    """How often a prompt whose replies are all worth the same is answered again in its step, so that it teaches
    something (DAPO's dynamic sampling, with the same prompt); `resampled` is logged."""
    updates: int = key(1, check=gt(0), also=("num_iterations",))
    """Optimizer updates on the same replies."""
    beta: float = key(0.0, check=ge(0))
    """Weight of the divergence from the reference model, a mean over tokens. 0 for none."""
    kl: Kind = "unbiased"
    """How that divergence is estimated: k1, k2, k3 (Schulman), or k3 times the ratio to the policy that sampled, which
    alone has its value and its gradient."""
    entropy: float = key(0.0, check=ge(0))
    """Weight of the policy's mean entropy, which is made larger."""
    correction: Correction = "none"
    """What becomes of the gap between sampler and trainer: token and sequence weigh by the truncated ratio of their
    probabilities, mask leaves tokens out whose ratio is too far from 1."""
    correction_cap: float = key(2.0, check=gt(1))
    """Where that ratio is truncated, or masked."""
    max_gap: float | None = key(0.2, check=optional(gt(0)))
    """Mean difference in nats between the log-probabilities that sampler and trainer give a sampled token, above which
    the run ends: then what speaks is not what is trained. null for any."""
    max_staleness: int = key(0, check=(ge(0), le(1)))
    """1 samples the replies of the next step while this one is learned from: they are then of the policy one step
    before, which needs `correction`. For samplers beside the trainer."""
    mask_truncated: bool = key(False, also=("mask_truncated_completions",))
    """Learn nothing from replies that were cut off at their most tokens."""
    eval_samples: int = key(1, check=gt(0))
    """Replies to each prompt in an evaluation, which reports mean rewards."""
    eval_temperature: float | None = key(None, check=optional(ge(0)))
    """Of these replies; 0 for the likeliest tokens. By default the sampler's."""
    branching: bool = True
    """Compute the prompt of a group once, where the model's attention can. False pads instead: the same result."""
    widest: Any = attrs.field(init=False, repr=False, default=0.0)
    """Of the step in hand, the largest |log p(sampler) - log p(trainer)| of a sampled token."""

    @property
    def updates_per_step(self) -> int:  # type: ignore[override]
        """Optimizer updates in a step."""
        return self.updates

    @property
    def surrogate(self) -> Surrogate:
        """The loss with its options."""
        return Surrogate(self.loss_type, {"clip_low": self.clip_low, "clip_high": self.clip_high} | self.loss_args)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself."""
        yield from super().check()
        problems = list(self.surrogate.problems())
        yield from (("loss_args" if name in self.loss_args else name, message) for name, message in problems)
        if not problems and self.group_size == 1 and (how := self.compared) != "batch":
            yield "group_size", f"the advantage {how!r} compares a reply with others to the same prompt: 2 or more"
        if self.environment is not None and isinstance(self.data, PromptData) and self.data.text_column is not None:
            yield "environment", "needs conversations, and data.text_column names plain text"
        if self.reference is not None and not self.beta:
            yield "reference", "has no use while beta is 0"
        if self.max_staleness and isinstance(self.sampler, TransformersSampler | VllmSampler):
            yield "max_staleness", "has no use with a sampler on the device of the trainer; take vllm-server"
        if self.max_staleness and self.correction == "none":
            yield "max_staleness", "replies of an earlier policy need a correction: token, sequence or mask"
        if self.max_staleness and getattr(self.environment, "seconds", None):
            yield "max_staleness", "tools are called beside training then, without limit: say environment.seconds: null"

    @property
    def compared(self) -> Advantage:
        """How rewards become advantages."""
        return self.advantage or self.surrogate.loss.advantage

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference: with `beta`."""
        return bool(self.beta)

    def load_data(self, fabric: "Fabric", tokenizer: Any, data: DataBlock) -> Loaders:
        """Return the loaders, of prompts that list the tools of the environment."""
        tools = self.environment.specs if self.environment is not None else []
        if tools and isinstance(data, PromptData):
            data = attrs.evolve(data, tools=[*data.tools, *tools])
        return super().load_data(fabric, tokenizer, data)

    def scored(self, run: "Run") -> "Scored":
        """Return what lets the policy speak, perhaps with an environment, and scores what it says."""
        from posttrain.blocks.rollouts.scored import Scored

        args = self.data.template_args if isinstance(self.data, PromptData) else {}
        more = self.environment, args, self.resample, bool(self.max_staleness)
        return Scored(run, self.sampler, self.rewards, self.seed, *more)

    def groups(self) -> "Iterator[Fetch]":
        """Yield the prompts of each step, looking ahead if the sampler does."""
        found: Iterator[Fetch] = super().groups()
        return self.replies.ahead.groups(found) if self.max_staleness else found

    @property
    def gives_rewards(self) -> bool:
        """Whether the environment does."""
        return self.environment is not None and self.environment.weight != 0

    @property
    def longest(self) -> int:
        """The most tokens that the policy may say to a prompt."""
        return self.sampler.max_new_tokens * (self.environment.max_turns if self.environment is not None else 1)

    # -- a step -----------------------------------------------------------------------

    def made(self, batches: list[Batch]) -> list[Batch]:
        """Return what was said to the prompts, and how much better than expected it is."""
        from posttrain.blocks.rollouts.groups import batch_of

        run = self.run
        groups = self.replies.groups(batches, self.group_size, self.compared)
        keys: dict[str, Any] = {"packing": self.branching, "mask_truncated": self.mask_truncated}
        found = [batch_of(some, run.tokenizer, **keys) for some in groups]
        return [self.answered(run.to_device(batch)) for batch in found]

    def answered(self, batch: Batch) -> Batch:
        """Return a batch with what the reference says of its tokens, and the policy before a second update."""
        import torch

        with torch.no_grad():
            if self.beta:
                batch = batch.but(reference=Extra(self.log_probs(self.run.frozen["reference"], batch), "target"))
            if self.updates > 1:
                batch = batch.but(old=Extra(self.log_probs(self.run.model, batch), "target"))
        return batch

    def log_probs(self, network: Any, batch: Batch) -> "Tensor":
        """Return the log-probability of each token under the policy of a network, [n]."""
        found: Tensor = network(batch, "log_probs", temperature=self.sampler.temperature)
        return found

    def step(self, batches: list[Batch]) -> "Tensor":
        """Make the updates, and see that sampler and trainer agree.

        Raises:
            TrainingError: they do not.
        """
        self.widest = 0.0
        losses, gap = [self.update(batches) for _ in range(self.updates)], gap_of(self.run, self.widest)
        if self.max_gap is not None and gap is not None and gap > self.max_gap:
            raise TrainingError(
                f"step {self.run.step + 1}: log-probabilities of sampler and trainer differ by {gap:.3g} on average "
                f"(max_gap is {self.max_gap:g}): what speaks is not the model in training as it is now"
                + (", or one step moves it too far for replies of the step before" if self.max_staleness else "")
            )
        return losses[-1]

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Return the terms of the loss: the policy's, the divergence from the reference, the entropy."""
        new, entropy = self.run.model(batch, "policy", temperature=self.sampler.temperature)
        old = batch.get("old", new.detach())
        replies = Replies(batch["document"], batch["lengths"], self.longest)
        advantages = batch["advantages"]
        if self.correction != "none":
            weights = correction(old, batch["sampled"], replies, self.correction, self.correction_cap)
            advantages = advantages * weights
        losses = self.surrogate(new, old, advantages, replies)
        over = "replies" if self.surrogate.loss.over == "replies" else "supervised_tokens"
        terms = {"policy": Term(losses.sum(), over)}
        if self.beta:
            kl = divergence_from(batch["reference"], new, old, self.kl)
            terms["kl"] = Term(kl.sum(), "supervised_tokens", self.beta)
        entropy = entropy if self.entropy else entropy.detach()
        terms["entropy"] = Term(entropy.sum(), "supervised_tokens", -self.entropy)
        self.note(new.detach(), old, batch, replies)
        return terms

    def note(self, new: "Tensor", old: "Tensor", batch: Batch, replies: Replies) -> None:
        """Log what is known of the replies, and how far the policy has moved since they were said."""
        gap = old - batch["sampled"]
        each = {
            GAP: gap.abs(), "sampler/kl": gap.exp() - 1 - gap, "policy/moved": ((new - old).exp() - 1).abs(),
            "policy/clipped": self.surrogate.clipped(new, old, replies),
        }  # fmt: skip
        if self.correction != "none":
            each["sampler/corrected"] = bounded(gap, replies, self.correction, self.correction_cap)
        if batch.weight and len(gap):
            self.widest = gap.abs().max().clamp(min=self.widest)
        self.run.log(**{name: Term(total, f"{name}, known", 0.0) for name, total in batch["facts"].items()})
        self.run.log(**{name: Term(x.sum(), "supervised_tokens", 0.0) for name, x in each.items()})

    def measured(self, batch: Batch) -> "dict[str, Tensor | Term]":
        """Return the mean rewards of replies to the prompts of an evaluation."""
        found: dict[str, Tensor | Term] = self.replies.means(batch, self.eval_samples, self.eval_temperature)
        return found
