"""Reward models: one number for a conversation, read off at its last token."""

from torch import Tensor

from posttrain.batch import Batch
from posttrain.blocks.models.causal import PackedModel
from posttrain.errors import TrainingError


class Scorer(PackedModel):
    """A transformers model for sequence classification with one label."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the rewards of both sides of pairs, float32 [pairs, 2].

        Raises:
            TrainingError: a side ends with the padding token, where transformers would look at another one.
        """
        if batch["ends_with_padding"]:
            raise TrainingError(
                "a conversation ends with the tokenizer's padding token, which transformers would take for padding: "
                "choose another one with tokenizer.pad_token"
            )
        layout = self.layout(batch)
        last = self.hidden_states(layout).flatten(0, 1).index_select(0, layout.ends)
        rewards: Tensor = self.base.score(last)
        return rewards.float().view(-1, 2)
