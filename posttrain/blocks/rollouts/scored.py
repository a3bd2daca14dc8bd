"""What methods of rewards have in common: prompts are answered, replies are scored, and both are written down."""

from typing import TYPE_CHECKING, Any

import torch

from posttrain.batch import Batch
from posttrain.blocks.losses.surrogate import Advantage
from posttrain.blocks.rollouts.advantages import compare
from posttrain.blocks.rollouts.ahead import Ahead
from posttrain.blocks.rollouts.groups import (
    TEXT_ALONE,
    Answer,
    asked,
    groups_in,
    holds_images,
    keys_of,
    means_of,
    replies_to,
    speak,
)
from posttrain.blocks.rollouts.ledger import EVALUATIONS, Rollouts
from posttrain.blocks.rollouts.replies import Group, Reply
from posttrain.blocks.rollouts.rewards import ModelReward, named, score
from posttrain.errors import RecipeError, TrainingError
from posttrain.interfaces import (
    AgentBlock,
    AheadSampler,
    EnvironmentBlock,
    RewardBlock,
    SamplerBlock,
    SeeingSampler,
)
from posttrain.runtime.launch import all_reduce

if TYPE_CHECKING:
    from posttrain.run import Run


class Scored:
    """Replies to the prompts of a run, and what they are worth."""

    def __init__(
        self, run: "Run", sampler: SamplerBlock, rewards: list[RewardBlock], seed: int,
        environment: EnvironmentBlock | None = None, template_args: dict[str, Any] | None = None, resample: int = 0,
        ahead: bool = False,
    ) -> None:  # fmt: skip
        self.run, self.rewards, self.seed, self.resample = run, named(rewards), seed, resample
        self.speaker = sampler.build(run)
        self.answer: Answer = self.replies
        self.blind = self.unfit(environment)
        if self.blind is not None and holds_images(run):
            raise RecipeError(self.blind)
        self.weight = environment.weight if environment is not None else 0.0
        if isinstance(environment, AgentBlock):
            from posttrain.blocks.rollouts.agents.agents import Agents

            self.answer = Agents(run, self.speaker, environment, template_args or {}).answers
        elif environment is not None:
            from posttrain.blocks.rollouts.turns.conversations import Conversations

            self.answer = Conversations(run, self.speaker, environment, template_args or {}).answers
        self.ahead: Ahead | None = None
        if ahead:
            if not isinstance(self.speaker, AheadSampler):
                raise RecipeError(f"max_staleness: the sampler {type(sampler).__name__} cannot run ahead")
            self.ahead = self.answer = Ahead(run, self.speaker, self.answer, seed)
        self.scorers = {name: one.build(run) for name, one in self.rewards.items()}
        self.rollouts, self.evaluations = Rollouts(run), Rollouts(run, EVALUATIONS)

    def unfit(self, environment: EnvironmentBlock | None) -> str | None:
        """Return why prompts cannot hold images, if so."""
        if environment is not None:
            return "environment: the data holds images, and a conversation of several turns takes none: leave one out"
        if any(isinstance(one, ModelReward) for one in self.rewards.values()):
            return "rewards: `type: model` reads text alone, and the data holds images: take another reward"
        return None if isinstance(self.speaker, SeeingSampler) else TEXT_ALONE

    def replies(
        self, groups: list[Group], keys: list[tuple[int, ...]], n: int, temperature: float | None
    ) -> list[list[Reply]]:
        """Return n replies of one turn to each prompt."""
        prompts, images = [group.prompt for group in groups], [group.images for group in groups]
        return replies_to(self.speaker, prompts, images, keys, n, temperature)

    def speak(self, groups: list[Group], keys: list[tuple[int, ...]], n: int, temperature: float | None = None) -> None:
        """Give every group n replies to its prompt.

        Raises:
            TrainingError: a stream holds images, and something here takes none.
        """
        if self.blind is not None and any(group.images for group in groups):
            raise TrainingError(self.blind)
        speak(self.run, self.answer, groups, keys, n, temperature)

    def groups(self, batches: list[Batch], n: int, advantage: Advantage) -> list[list[Group]]:
        """Return n replies to each prompt of a step, batch by batch, with their rewards and advantages.

        Raises:
            TrainingError: every reward of the step failed.
        """
        groups = asked(self.run, batches)
        every = [group for some in groups for group in some]
        key = self.seed, self.run.step
        self.speak(every, [(*key, group.place) for group in every], n)
        if self.ahead is not None and not self.resample:
            self.ahead.begin(n)  # before the rewards, which may be slow
        score(every, self.rewards, self.scorers, self.weight)
        for group in every if self.resample else ():
            group.rounds = 0
        for again in range(1, self.resample + 1):
            flat = [group for group in every if group.flat]
            if not all_reduce(self.run.fabric, torch.tensor(float(len(flat)), device=self.run.fabric.device), "MAX"):
                break
            for group in flat:
                group.rounds = again
            self.speak(flat, [(*key, group.place, n, again) for group in flat], n)
            score(flat, self.rewards, self.scorers, self.weight)
        if self.ahead is not None and self.resample:
            self.ahead.begin(n)
        compare(every, advantage, self.run.fabric)
        self.rollouts.write(every, self.run.step + 1)
        return groups

    def means(self, batch: Batch, n: int, temperature: float | None = None) -> dict[str, Any]:
        """Return the mean rewards of n replies to each prompt of an evaluation, as terms."""
        groups = groups_in(batch)
        self.speak(groups, keys_of(groups, self.seed), n, temperature)
        score(groups, self.rewards, self.scorers, self.weight)
        if batch.tokens:  # else it only keeps another rank company
            self.evaluations.write(groups, self.run.step)
        return means_of(groups)
