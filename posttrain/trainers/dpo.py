"""Preference training: DPO and its relatives, on pairs of a chosen and a rejected reply."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import and_, ge, gt, lt, optional

from posttrain.batch import Batch
from posttrain.blocks.data.data import Data
from posttrain.blocks.data.kinds.preference import PreferenceData, unfit
from posttrain.blocks.losses import preference  # noqa: F401 - registers the losses
from posttrain.blocks.losses.objective import NAMED, Objective
from posttrain.blocks.models.model import HFModel
from posttrain.interfaces import DataBlock, ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainers.reference import ReferenceTrainer

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.run import Run


@block("trainer", "dpo")
class DPOTrainer(ReferenceTrainer):
    """Direct preference optimization, and other losses of the same pairs (`posttrain/blocks/losses/preference.py`)."""

    model: ModelBlock = default(HFModel, required=True)
    data: DataBlock = default(PreferenceData, required=True)
    precompute_reference: bool = key(False, also=("precompute_ref_log_probs",))
    """Ask the reference once for all pairs before training, keep its answers in the cache, and free its memory."""
    loss_type: str | list[str] | dict[str, float] = "sigmoid"
    """sigmoid (DPO), robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, apo_zero, apo_down, discopop,
    sigmoid_norm; without a reference orpo, simpo, sft. Several are added up, as a list or with weights:
    `{sigmoid: 1, sft: 0.2}`. The functions and their sources are in `posttrain/blocks/losses/preference.py`."""
    beta: float | None = key(None, check=optional(gt(0)))
    """Scale of rewards: higher ties the model closer to the reference. By default the loss's own: 0.1, SimPO 2."""
    label_smoothing: float | None = key(None, check=optional(and_(ge(0), lt(0.5))))
    """Probability that a label is wrong, for the losses that take it."""
    loss_args: dict[str, float | bool] = attrs.field(factory=dict)
    """Further options of the losses: `gamma` of simpo, `tau` of discopop, `average` of ipo."""

    @property
    def objective(self) -> Objective:
        """The losses with their weights and options."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        weights = names if isinstance(names, dict) else dict.fromkeys(names, 1.0)
        given = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return Objective(weights, {k: v for k, v in given.items() if v is not None} | self.loss_args)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the losses and their options."""
        yield from super().check()
        yield from unfit(self.data, pairs=True)
        if isinstance(self.loss_type, list) and len(set(self.loss_type)) < len(self.loss_type):
            yield "loss_type", "names a loss twice; give it a weight: {sigmoid: 2}"
        for name in self.loss_args.keys() & set(NAMED):
            yield "loss_args", f"{name} is a key of its own: write `{name}: {self.loss_args[name]}`"
        objective = self.objective
        if found := list(objective.problems()):
            yield from found
        elif not objective.needs_reference:
            for name in ("reference", "precompute_reference"):
                if getattr(self, name):
                    yield name, f"{' + '.join(objective.weights)} has no use for a reference model"
        elif self.precompute_reference and isinstance(self.data, Data) and self.data.streams:
            yield "precompute_reference", "cannot be asked ahead about a stream, which is read while training"

    @property
    def needs_reference(self) -> bool:
        """Whether one of the losses looks at the reference."""
        return self.objective.needs_reference

    def prepare(self) -> dict[str, Any]:
        """Tokenize, and record what the reference says if it is to be asked only once."""
        return self.setup().loaders.ledger if self.precompute_reference else super().prepare()

    def setup(self) -> "Run":
        """Ask the reference about all pairs, if it is to be asked only once."""
        from posttrain.blocks.data.recorded import record_targets

        run = super().setup()
        if self.precompute_reference:
            record_targets(run, "reference", self.data)
        return run

    def loss(self, batch: Batch) -> "Tensor":
        """Return the mean loss of the pairs."""
        from posttrain.blocks.losses.joint import through

        policy, reference = self.log_probs(batch)
        if "joint" in batch:
            losses = through(policy, *batch["joint"])
        else:
            losses = self.objective(policy, reference, batch["lengths"], batch.get("mean_lengths"))
        self.run.log(**self.objective.metrics(policy.detach(), reference, batch["lengths"]))
        return losses.sum() / batch.weight

    def log_probs(self, batch: Batch) -> "tuple[Tensor, Tensor]":
        """Return the summed log-probabilities of both replies, [pairs, 2], of the model and of the reference."""
        reference = batch.get("reference_log_probs")
        if reference is None and self.objective.needs_reference:  # first, while no graph is held
            reference = self.run.frozen["reference"](batch, "log_probs")
        policy = self.run.model(batch, "log_probs")
        reference = policy.detach() if reference is None else reference
        both = (x.new_zeros(batch["lengths"].numel()).index_add(0, batch["side"], x) for x in (policy, reference))
        ours, theirs = (sums.view(-1, 2) for sums in both)
        return ours, theirs

    def together(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Let losses that depend on all pairs of a step see them all."""
        from posttrain.blocks.losses import joint

        objective, fabric = self.objective, self.run.fabric
        if objective.over_step:
            return joint.with_joint_losses(batches, self.log_probs, objective, fabric)
        return joint.with_mean_lengths(batches, fabric) if objective.takes("mean_lengths") else batches
