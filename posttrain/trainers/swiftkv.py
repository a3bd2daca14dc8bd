"""SwiftKV distillation: upper layers learn to do with the keys and values of one lower layer."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

from attrs.validators import ge, gt, lt

from posttrain.batch import Batch
from posttrain.blocks.data.kinds.preference import unfit
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.models.swiftkv.model import SwiftKVModel
from posttrain.interfaces import DataBlock, ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor


@block("trainer", "swiftkv")
class SwiftKVTrainer(Trainer):
    """SwiftKV distillation (Qiao et al., arXiv:2410.03960): the student matches logits and a hidden state."""

    cuts_rows: ClassVar[bool] = True
    model: ModelBlock = default(SwiftKVModel, required=True)
    data: DataBlock = default(SFTData, required=True)
    temperature: float = key(2.0, also=("logits_loss_temp",), check=gt(0))
    """What the logits of both are divided by; the divergence is multiplied by its square."""
    hidden_loss_mult: float = key(1.0, check=ge(0))
    """Weight of the mean squared error between hidden states. How large that is, is a matter of the model: where the
    logged `hidden_error` starts hundreds of times above `divergence`, a weight of 0.003 lets both count alike."""
    hidden_loss_layer: int = key(-2, check=lt(0))
    """Which hidden state, as transformers counts them from the end: -2 is the input of the last layer."""
    arctic_masks: bool = False
    """Compare as ArcticTraining does: logits at the supervised tokens themselves instead of where they are predicted,
    hidden states at every token, both as means over every token."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        yield from unfit(self.data, pairs=False)
        if self.arctic_masks and self.sequence:
            yield "arctic_masks", "compares positions of whole rows, but `sequence` divides them"

    def together(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """With ArcticTraining's masks, a step is a mean over all tokens."""
        return (b.but(weight=b.tokens if b.weight else 0) for b in batches) if self.arctic_masks else batches

    def loss(self, batch: Batch) -> "Tensor":
        """Return the mean distance of student and teacher, and log its parts and how often both would say the same."""
        positions = self.positions(batch)
        distance = self.run.model(batch, "distance", self.temperature, self.hidden_loss_layer, *positions)
        divergence, squared, same = (distance / batch.weight).unbind()
        self.run.log(divergence=divergence, hidden_error=squared)
        if not self.arctic_masks:  # else it is not a mean over all tokens
            self.run.log(agreement=same)
        total: Tensor = self.temperature**2 * divergence + self.hidden_loss_mult * squared
        return total

    def positions(self, batch: Batch) -> "tuple[Tensor, Tensor]":
        """Return the flat positions where logits and hidden states are compared."""
        if not self.arctic_masks:
            return batch.supervised, batch.supervised
        import torch

        width = batch.input_ids.shape[-1]
        real = torch.arange(width, device=batch.row_lengths.device) < batch.row_lengths[:, None]
        return batch.supervised + 1, real.flatten().nonzero()[:, 0]
