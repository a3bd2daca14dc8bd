"""The network that the SwiftKV trainer calls: student and teacher side by side, in one pass."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Batch
from posttrain.blocks.losses.cross_entropy import divergence_sum
from posttrain.blocks.models.causal import CausalLM

FIRST = ("input_ids", "position_ids", "attention_mask", "use_cache")
"""Arguments that only the first layers take; what they make of them is handed on."""
log = logging.getLogger("posttrain")


class SwiftKV(CausalLM):
    """A causal language model, its student, and how far they are apart."""

    def train(self, mode: bool = True) -> "SwiftKV":
        """Stay in evaluation mode: the teacher must not drop anything out."""
        return super().train(False)

    def forward(self, batch: Batch, output: Any = "nll", *args: Any, **kwargs: Any) -> Any:
        """Compute as CausalLM does, with the student; or with `output="distance"` what `distance` returns."""
        if output == "distance":
            return self.distance(batch, *args, **kwargs)
        return super().forward(batch, output, *args, **kwargs)

    def distance(
        self, batch: Batch, temperature: float, hidden_layer: int, logits_at: Tensor, hidden_at: Tensor
    ) -> Tensor:
        """Compare student and teacher.

        Args:
            batch: see layout.py.
            temperature: what logits are divided by.
            hidden_layer: whose input is compared, as transformers counts hidden states: -1 is behind the last norm,
                -2 the input of the last layer.
            logits_at, hidden_at: int64, the flat positions where logits and hidden states are compared.

        Returns:
            float32 [3]: the summed KL(teacher || student) in nats, the summed mean squared error of hidden states,
            and at how many positions the likeliest token is the same.
        """
        layout = self.layout(batch)
        model, given = self.base.model, self.given(layout)
        with self.running(layout):
            below = model.below(**given)
            rest = {name: value for name, value in given.items() if name not in FIRST}
            with torch.no_grad():
                theirs = [*model.teacher(below, **rest)]
            ours = [*model.student(below, **rest)]
        finals = [model.norm(states[-1]).flatten(0, 1) for states in (ours, theirs)]
        compared = [states[hidden_layer].flatten(0, 1) for states in (ours, theirs)] if hidden_layer < -1 else finals
        one, other = (states.index_select(0, hidden_at).float() for states in compared)
        squared = ((one - other) ** 2).mean(-1).sum()
        head = self.base.get_output_embeddings().weight
        student, teacher = (states.index_select(0, logits_at) for states in finals)
        divergence, same = divergence_sum(student, teacher, head, temperature)
        return torch.stack([divergence, squared, same])

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the whole network, teacher's upper projections included, and say who can serve it."""
        super().save_pretrained(folder, state_dict)
        group, architecture = self.base.config.key_value_group_size, type(self.base).__name__
        if group == 1:
            log.info("%s: arctic-inference can load this export, if it knows the architecture", architecture)
        else:
            log.info("%s: arctic-inference cannot load this export, it knows no groups of %d", architecture, group)
