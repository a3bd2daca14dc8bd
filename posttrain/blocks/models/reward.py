"""Reward models: one number for a conversation, read off at its last token."""

from typing import Any

import transformers
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GenericForSequenceClassification

from posttrain.batch import Batch
from posttrain.blocks.models.packed import PackedModel
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


def know_scores(config: Any) -> None:
    """Tell transformers how a model of images and text gives a score, if it does not know: it has such a class for few.

    It is made like those for models of text: one linear layer on the last hidden state of the last token.
    `AutoModelForSequenceClassification` loads what is exported once this was called with its configuration.
    """
    scorers, kind = transformers.AutoModelForSequenceClassification, type(config)
    both = transformers.AutoModelForImageTextToText._model_mapping
    if kind in scorers._model_mapping or kind not in both or kind not in transformers.AutoModel._model_mapping:
        return
    family = next(base for base in both[kind].__mro__[1:] if issubclass(base, transformers.PreTrainedModel))
    if family.base_model_prefix != GenericForSequenceClassification.base_model_prefix:
        return  # its network is built in another way
    name = both[kind].__name__.removesuffix("ForConditionalGeneration") + "ForSequenceClassification"
    if (renamed := get_checkpoint_conversion_mapping(both[kind].__name__)) is not None:  # of files of older versions
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    said = {"config_class": kind, "__module__": family.__module__}
    made = type(name, (GenericForSequenceClassification, family), said)
    scorers.register(kind, made, exist_ok=True)  # else classes for configurations of theirs are passed over
