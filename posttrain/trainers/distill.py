"""Distillation: a student learns the next-token distribution of a teacher, whose answers may be stored ahead."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from attrs.validators import gt, optional

from posttrain.batch import Batch
from posttrain.blocks.data.data import Data
from posttrain.blocks.data.kinds.preference import unfit
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.models.model import HFModel
from posttrain.interfaces import DataBlock, ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainer import Trainer

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor, nn

    from posttrain.run import Run


@block("trainer", "distill")
class DistillTrainer(Trainer):
    """Distillation from the teacher's k likeliest tokens at every supervised position (see divergence.py).

    By default a pass of the teacher over the data comes first. It is kept in the cache: an interrupted pass goes on
    where it was, and a later run with the same teacher and data needs no teacher at all.
    """

    model: ModelBlock = default(HFModel, required=True)
    data: DataBlock = default(SFTData, required=True)
    teacher: ModelBlock = default(HFModel, required=True)
    """Has the student's tokens; its vocabulary may be padded to another size."""
    stored: bool = True
    """Ask the teacher ahead of training, once; else in every step, with its weights in memory."""
    top_k: int | None = key(64, check=optional(gt(0)))
    """Tokens whose log-probabilities are kept, 8 bytes each; null for the whole vocabulary."""
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """KL(teacher || student), KL(student || teacher), or Jensen-Shannon."""
    temperature: float = key(1.0, check=gt(0))
    """What the logits of both are divided by; the loss is multiplied by its square."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        yield from unfit(self.data, pairs=False)
        if self.stored and isinstance(self.data, Data) and self.data.streams:
            yield (
                "stored",
                "a stream is read while training, so the teacher cannot be asked ahead: set it to false",
            )

    def build_frozen(self, fabric: "Fabric", model: "nn.Module") -> "dict[str, nn.Module]":
        """Build the teacher only if it takes part in every step."""
        return {} if self.stored else super().build_frozen(fabric, model)

    def prepare(self) -> dict[str, Any]:
        """Tokenize, and record the teacher's answers."""
        return self.setup().loaders.ledger if self.stored else super().prepare()

    def setup(self) -> "Run":
        """Record the teacher's answers, as far as they are not there yet."""
        from posttrain.blocks.data.recorded import record_top

        run = super().setup()
        if self.stored:
            record_top(run, self.teacher, self.data, self.tokens_kept(run), self.temperature)
        return run

    def tokens_kept(self, run: "Run") -> int:
        """Return k: the student cannot be asked about more tokens than it knows."""
        vocabulary: int = run.model.module.vocabulary  # type: ignore[assignment]
        return min(self.top_k or vocabulary, vocabulary)

    def loss(self, batch: Batch) -> "Tensor":
        """Return the mean divergence of the supervised positions, in nats."""
        from posttrain.blocks.losses.divergence import divergence

        run = self.run
        answers = batch if self.stored else self.ask(batch)
        teacher, tokens = answers["teacher_log_probs"], answers["teacher_tokens"].long()
        student = run.model(batch, "log_probs", tokens, self.temperature)
        whole = tokens.shape[-1] == run.model.module.vocabulary
        distances = divergence(teacher, student, self.divergence, whole)
        run.log(teacher_mass=teacher.exp().sum() / batch.weight)
        return self.temperature**2 * distances.sum() / batch.weight

    def ask(self, batch: Batch) -> "dict[str, Any]":
        """Return what the teacher says of a batch, in the step."""
        from posttrain.blocks.data.recorded import top_answers

        run = self.run
        vocabulary: int = run.model.module.vocabulary  # type: ignore[assignment]
        return top_answers(run.frozen["teacher"], batch, self.tokens_kept(run), self.temperature, vocabulary)
