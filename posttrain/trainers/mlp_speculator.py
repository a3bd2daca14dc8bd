"""MLP-speculator distillation: heads learn to draft what the base model says, from text or from its own."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from attrs.validators import ge, gt, optional

from posttrain.batch import Batch
from posttrain.blocks.data.kinds.preference import unfit
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.models.speculator.model import SpeculatorModel
from posttrain.interfaces import DataBlock, ModelBlock
from posttrain.registry import block, default, key
from posttrain.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor


@block("trainer", "mlp-speculator", also=("spec-decode",))
class SpeculatorTrainer(Trainer):
    """Speculator training (Wertheimer et al., arXiv:2404.19124): stage 1 on text, stage 2 on the base model's own."""

    model: ModelBlock = default(SpeculatorModel, required=True)
    data: DataBlock = default(SFTData, required=True)
    generate_from: int | None = key(None, check=optional(ge(0)))
    """The step from which on the base model continues prompts taken from the data, and its words are trained on:
    stage 2. 0 is from the beginning, null never."""
    gen_prompt_length: int = key(64, check=gt(0))
    """Tokens of a prompt; each document gives as many as fit into it."""
    gen_seq_length: int = key(256, check=gt(1))
    """Tokens that the base model says to each."""
    gen_micro_batch: int = key(32, check=gt(0))
    """Prompts continued at a time."""
    gen_temperature: float = key(1.0, check=ge(0))
    """Of sampling; 0 takes the likeliest token."""
    gen_top_k: int = key(10, check=gt(0))
    """Sample from so many likeliest tokens."""
    gen_server: str | None = None
    """Base URL of a vLLM server that serves the base model (`http://localhost:8000/v1`); it continues the prompts
    then, instead of the copy in training."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts the data."""
        yield from super().check()
        yield from unfit(self.data, pairs=False)
        if self.generate_from is not None and self.gen_server is None and self.strategy.shards_parameters:
            yield (
                "generate_from",
                "ranks that share a sharded base model would wait for one another while it generates: serve it with "
                "vLLM and give gen_server, or take `strategy: ddp`",
            )

    def made(self, batches: list[Batch]) -> list[Batch]:
        """Return the data, or from `generate_from` on what the base model makes of it."""
        if self.generate_from is None or self.run.step < self.generate_from:
            return batches
        return [self.continuation(batch) for batch in batches]

    def continuation(self, batch: Batch) -> Batch:
        """Return a batch of what the base model says to prompts from this one."""
        from posttrain.blocks.models.speculator.continuation import continued

        options: dict[str, Any] = {
            "prompt_length": self.gen_prompt_length, "new_tokens": self.gen_seq_length,
            "at_a_time": self.gen_micro_batch, "temperature": self.gen_temperature, "top_k": self.gen_top_k,
            "server": self.gen_server,
        }  # fmt: skip
        return self.run.to_device(continued(self.run, batch, **options))

    def together(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Let a step be a mean over positions from which on all heads have something to guess."""
        from posttrain.blocks.models.speculator.continuation import with_positions

        heads: int = self.run.model.module.speculator.config["n_predict"]  # type: ignore[union-attr,index,assignment]
        return (self.run.to_device(with_positions(batch, heads)) for batch in batches)

    def loss(self, batch: Batch) -> "Tensor":
        """Return the sum over heads of the mean negative log-likelihood of what each should have drafted, in nats."""
        positions = batch.supervised.index_select(0, batch["chosen"]) - 1
        losses, right = (self.run.model(batch, positions) / batch.weight).unbind()
        self.run.log(**{f"loss/head_{i}": loss for i, loss in enumerate(losses)})
        if not self.run.model.training:
            self.run.log(**{f"accuracy/head_{i}": share for i, share in enumerate(right)})
        total: Tensor = losses.sum()
        return total
