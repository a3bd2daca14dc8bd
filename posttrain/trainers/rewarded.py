"""Trainers that learn from what the model itself says: it answers prompts, and rewards score the replies."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.data.data import Data
from posttrain.blocks.rollouts.prompts import PromptData
from posttrain.blocks.rollouts.rewards import as_rewards
from posttrain.blocks.rollouts.sampler import TransformersSampler
from posttrain.interfaces import DataBlock, RewardBlock, SamplerBlock
from posttrain.registry import default, key
from posttrain.trainers.reference import ReferenceTrainer

if TYPE_CHECKING:
    from posttrain.blocks.rollouts.scored import Scored
    from posttrain.run import Run


@attrs.define(kw_only=True, slots=False, eq=False)
class RewardedTrainer(ReferenceTrainer):
    """What trainers with rewards for sampled replies share."""

    data: DataBlock = default(PromptData, required=True)
    rewards: list[RewardBlock] = key(factory=list, convert=as_rewards, also=("reward_funcs",))
    """What replies are worth: the weighted sum of these, and of what an environment gives."""
    sampler: SamplerBlock = default(TransformersSampler)
    """Samples the replies."""
    replies: Any = attrs.field(init=False, repr=False)
    """A `Scored` (posttrain/blocks/rollouts/scored.py) while training."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        if not self.rewards and not self.gives_rewards:
            yield "rewards", "give at least one: nothing else says what a reply is worth"
        if isinstance(self.data, Data) and not isinstance(self.data, PromptData):
            yield "data", f"this trainer needs prompts (type: prompts), and {type(self.data).__name__} gives replies"
        if self.sequence:
            yield "sequence", "ranks cannot share rows whose replies are still to be said"

    @property
    def gives_rewards(self) -> bool:
        """Whether something besides `rewards` says what replies are worth."""
        return False

    def setup(self) -> "Run":
        """Build the sampler and the rewards, too."""
        run = super().setup()
        self.replies = self.scored(run)
        return run

    def scored(self, run: "Run") -> "Scored":
        """Return what samples replies and scores them."""
        from posttrain.blocks.rollouts.scored import Scored

        return Scored(run, self.sampler, self.rewards, self.seed)
