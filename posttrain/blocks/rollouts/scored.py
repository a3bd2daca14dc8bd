"""What methods of rewards have in common: prompts are answered, replies are scored, and both are written down."""

from typing import TYPE_CHECKING, Any

from posttrain.batch import Batch
from posttrain.blocks.losses.surrogate import Advantage
from posttrain.blocks.rollouts.advantages import compare
from posttrain.blocks.rollouts.groups import ask, ask_again, means_of
from posttrain.blocks.rollouts.ledger import EVALUATIONS, Rollouts
from posttrain.blocks.rollouts.replies import Group
from posttrain.blocks.rollouts.rewards import named, score
from posttrain.interfaces import RewardBlock, SamplerBlock

if TYPE_CHECKING:
    from posttrain.run import Run


class Scored:
    """Replies to the prompts of a run, and what they are worth."""

    def __init__(self, run: "Run", sampler: SamplerBlock, rewards: list[RewardBlock], seed: int) -> None:
        self.run, self.rewards, self.seed = run, named(rewards), seed
        self.speaker = sampler.build(run)
        self.scorers = {name: one.build(run) for name, one in self.rewards.items()}
        self.rollouts, self.evaluations = Rollouts(run), Rollouts(run, EVALUATIONS)

    def groups(self, batches: list[Batch], n: int, advantage: Advantage) -> list[list[Group]]:
        """Return n replies to each prompt of a step, batch by batch, with their rewards and advantages.

        Raises:
            TrainingError: every reward of the step failed.
        """
        groups = ask(self.run, self.speaker, batches, n, self.seed)
        every = [group for some in groups for group in some]
        score(every, self.rewards, self.scorers)
        compare(every, advantage, self.run.fabric)
        self.rollouts.write(every, self.run.step + 1)
        return groups

    def means(self, batch: Batch, n: int, temperature: float | None = None) -> dict[str, Any]:
        """Return the mean rewards of n replies to each prompt of an evaluation, as terms."""
        groups = ask_again(self.run, self.speaker, batch, n, self.seed, temperature)
        score(groups, self.rewards, self.scorers)
        if batch.tokens:  # else it only keeps another rank company
            self.evaluations.write(groups, self.run.step)
        return means_of(groups)
