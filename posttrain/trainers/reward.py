"""Reward modelling: a number for each conversation, higher for the side of a pair that people prefer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attrs.validators import ge

from posttrain.batch import Batch
from posttrain.blocks.data.kinds.preference import PreferenceData, unfit
from posttrain.blocks.losses.objective import accuracy, log_sigmoid
from posttrain.blocks.models.model import RewardModel
from posttrain.interfaces import DataBlock, ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.run import Run


@block("trainer", "reward")
class RewardTrainer(Trainer):
    """A reward model, trained with the Bradley-Terry loss (Ouyang et al., arXiv:2203.02155, eq. 1)."""

    model: ModelBlock = default(RewardModel, required=True)
    data: DataBlock = default(PreferenceData, required=True)
    """A column `margin` says by how much the chosen side should win (Touvron et al., arXiv:2307.09288, eq. 2)."""
    center_rewards: float = key(0.0, also=("center_rewards_coefficient",), check=ge(0))
    """Weight of the squared sum of both rewards, which keeps them around 0 (Eisenstein et al., arXiv:2312.09244)."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        yield from unfit(self.data, pairs=True)

    def setup(self) -> "Run":
        """Tell the exported model which token is padding."""
        run = super().setup()
        config: Any = run.model.module.base.config  # type: ignore[union-attr]
        for part in (config, config.get_text_config()):  # two, where the model sees images
            part.pad_token_id = run.tokenizer.pad_token_id
        return run

    def loss(self, batch: Batch) -> "Tensor":
        """Return the mean negative log-probability that the chosen side wins."""
        rewards = self.run.model(batch)  # [pairs, 2]
        margin = rewards[:, 0] - rewards[:, 1]
        losses: Tensor = -log_sigmoid(margin - batch["margins"]) + self.center_rewards * rewards.sum(-1) ** 2
        chosen, rejected = rewards.detach().mean(0)
        found = {"margin": margin.detach().mean(), "accuracy": accuracy(margin.detach())}
        found |= {"chosen": chosen, "rejected": rejected}
        self.run.log(**{f"rewards/{name}": value for name, value in found.items()})
        return losses.sum() / batch.weight
