"""Training from single verdicts: Kahneman-Tversky optimization, on replies that people found good or bad."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from attrs.validators import ge, gt

from posttrain.batch import Batch, Extra, Term
from posttrain.blocks.data.data import Data
from posttrain.blocks.data.kinds.unpaired import UnpairedData
from posttrain.blocks.models.model import HFModel
from posttrain.interfaces import DataBlock, ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainers.reference import ReferenceTrainer

if TYPE_CHECKING:
    from torch import Tensor


@block("trainer", "kto")
class KTOTrainer(ReferenceTrainer):
    """Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306).

    The point from which gains and losses are counted is the divergence from the reference, estimated over all rows of
    the step by replies of other rows: it does not depend on how the step is cut.
    """

    model: ModelBlock = default(HFModel, required=True)
    data: DataBlock = default(UnpairedData, required=True)
    beta: float = key(0.1, check=gt(0))
    """Scale of rewards: higher ties the model closer to the reference."""
    good_weight: float = key(1.0, check=ge(0), also=("desirable_weight",))
    """Of replies that are good. The paper's advice: the weights times the numbers of good and of bad replies should be
    within a factor of 4/3."""
    bad_weight: float = key(1.0, check=ge(0), also=("undesirable_weight",))
    """Of replies that are bad."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        if isinstance(self.data, Data) and not isinstance(self.data, UnpairedData):
            yield "data", f"this trainer needs verdicts (type: unpaired), and {type(self.data).__name__} gives none"
        if self.sequence:
            yield "sequence", "ranks cannot share rows that are compared with replies of other rows"

    def together(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Yield the batches with the estimated divergence, a mean over all of them."""
        import torch

        from posttrain.runtime.launch import all_reduce

        sums = torch.zeros(2, device=self.run.fabric.device)
        for batch in batches:
            others = batch["others"]
            with torch.no_grad():
                gains = self.gains(others, self.run.model)
            known = others["matched"] * bool(batch.weight)  # where weights are sharded, all ranks ask alike
            sums += torch.stack([(gains * known).sum(), known.sum()])
        all_reduce(self.run.fabric, sums)
        estimate = sums[0] / sums[1].clamp(min=1)
        for batch in batches:
            yield batch.but(estimate=Extra(estimate))

    def gains(self, batch: Batch, network: Any) -> "Tensor":
        """Return the summed log-probability of each reply, less that under the reference, in nats: [replies]."""
        reference = self.run.frozen["reference"](batch, "log_probs")
        policy: Tensor = network(batch, "log_probs")
        sums = policy.new_zeros(len(batch["lengths"]))
        return sums.index_add(0, batch["document"], policy - reference)

    def loss(self, batch: Batch) -> "Tensor":
        """Return the mean loss of the replies."""
        from posttrain.blocks.losses.unpaired import kto

        gains, good, estimate = self.gains(batch, self.run.model), batch["good"], batch["estimate"]
        losses = kto(gains, estimate, good, self.beta, self.good_weight, self.bad_weight)
        rewards = self.beta * gains.detach()
        self.run.log(kl=estimate.clamp(min=0))
        self.run.log(**{
            "rewards/good": Term((rewards * good).sum(), "good", 0.0),
            "rewards/bad": Term((rewards * ~good).sum(), "bad", 0.0),
        })  # fmt: skip
        return losses.sum() / batch.weight
