"""Supervised fine-tuning: next-token cross-entropy on the supervised tokens."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from posttrain.batch import Batch
from posttrain.blocks.data.kinds.causal import CausalData
from posttrain.blocks.data.kinds.preference import unfit
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.models.model import HFModel
from posttrain.interfaces import DataBlock, ModelBlock
from posttrain.registry import block, default
from posttrain.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor


@block("trainer", "sft")
class SFTTrainer(Trainer):
    """Supervised fine-tuning."""

    cuts_rows: ClassVar[bool] = True
    model: ModelBlock = default(HFModel, required=True)
    data: DataBlock = default(SFTData, required=True)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        yield from unfit(self.data, pairs=False)

    def loss(self, batch: Batch) -> "Tensor":
        """Return the mean negative log-likelihood of the supervised tokens, in nats."""
        nll: Tensor = self.run.model(batch)
        return nll / batch.weight


@block("trainer", "causal")
class CausalTrainer(SFTTrainer):
    """Next-token training on plain documents, as in pretraining: the same loss, on every token."""

    data: DataBlock = default(CausalData, required=True)
