"""Online preference training: the model says the pairs itself, and rewards tell which side is the better one."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
from attrs.validators import ge, gt, optional

from posttrain.batch import Batch, Term
from posttrain.blocks.losses import preference  # noqa: F401 - registers the losses
from posttrain.blocks.losses.objective import Objective
from posttrain.blocks.models.model import HFModel
from posttrain.interfaces import ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainers.rewarded import RewardedTrainer

if TYPE_CHECKING:
    from torch import Tensor


@block("trainer", "online-dpo")
class OnlineDPOTrainer(RewardedTrainer):
    """Online direct preference optimization (Guo et al., arXiv:2402.04792): of several replies to each prompt, the best
    and the worst are a pair.

    A prompt whose replies are all worth the same has no pair; it counts in the mean, with a loss of 0.
    """

    model: ModelBlock = default(HFModel, required=True)
    group_size: int = key(2, check=ge(2), also=("num_generations",))
    """Replies to each prompt, of which the best and the worst are a pair."""
    loss_type: str = "sigmoid"
    """A loss of single pairs with a reference, as in `type: dpo`: sigmoid (DPO), hinge, ipo, robust, ..."""
    beta: float | None = key(None, check=optional(gt(0)))
    """Scale of rewards: higher ties the model closer to the reference. By default the loss's own: 0.1."""
    loss_args: dict[str, float | bool] = attrs.field(factory=dict)
    """Further options of the loss."""

    @property
    def objective(self) -> Objective:
        """The loss with its options."""
        return Objective({self.loss_type: 1.0}, ({} if self.beta is None else {"beta": self.beta}) | self.loss_args)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself."""
        yield from super().check()
        if found := list(self.objective.problems()):
            yield from found
        elif self.objective.over_step or self.objective.takes("mean_lengths") or not self.objective.needs_reference:
            yield "loss_type", f"{self.loss_type} is no loss of single pairs with a reference"

    def made(self, batches: list[Batch]) -> list[Batch]:
        """Return pairs of what was said to the prompts."""
        from posttrain.blocks.rollouts.pairs import pairs_of

        run, groups = self.run, self.replies.groups(batches, self.group_size, "group")
        return [run.to_device(pairs_of(some, run.tokenizer)) for some in groups]

    def loss(self, batch: Batch) -> "dict[str, Term]":
        """Return the mean loss of the pairs."""
        reference = self.run.frozen["reference"](batch, "log_probs")
        policy = self.run.model(batch, "log_probs")
        both = (x.new_zeros(batch["lengths"].numel()).index_add(0, batch["side"], x) for x in (policy, reference))
        ours, theirs = (sums.view(-1, 2) for sums in both)
        differ = batch["differ"]
        found = self.objective.rewards(ours.detach(), theirs, batch["lengths"])
        margin = (found[:, 0] - found[:, 1]) * differ
        each = {"rewards/margin": margin, "rewards/accuracy": margin > 0}
        self.run.log(**{name: Term(x.sum(), "pairs", 0.0) for name, x in each.items()})
        self.run.log(**{name: Term(total, f"{name}, known", 0.0) for name, total in batch["facts"].items()})
        return {"preference": Term((self.objective(ours, theirs, batch["lengths"]) * differ).sum())}

    def measured(self, batch: Batch) -> "dict[str, Tensor | Term]":
        """Return the mean rewards of replies to the prompts of an evaluation."""
        found: dict[str, Tensor | Term] = self.replies.means(batch, 1)
        return found
