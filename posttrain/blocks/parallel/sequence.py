"""Sequence parallelism: ranks share the rows of a micro-batch along their length."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import gt

from posttrain.errors import RecipeError
from posttrain.interfaces import Batch, Loader, Loaders, Position
from posttrain.registry import block, key

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn


@block("sequence", "ulysses")
class Ulysses:
    """Each rank has a part of every row, and in attention some of the heads of whole rows (arXiv:2309.14509).

    Neighbouring ranks form a group. Between the two layouts lies an all-to-all (see ulysses.py), so that attention is
    the usual kernel and packed documents stay apart. Loss and gradients are those of one rank.
    """

    size: int = key(check=gt(1))
    """Ranks of a group; the model's attention heads must be a multiple of it."""

    def loaders(self, loaders: Loaders, fabric: "Fabric") -> Loaders:
        """Return loaders that give a rank its part of each row; the given ones count groups as ranks.

        Raises:
            RecipeError: the ranks cannot be divided into groups.
        """
        from torch.distributed import new_group

        if fabric.world_size % self.size:
            raise RecipeError(f"sequence.size: {fabric.world_size} ranks cannot be divided into groups of {self.size}")
        every = [new_group(list(range(i, i + self.size))) for i in range(0, fabric.world_size, self.size)]
        group, place = every[fabric.global_rank // self.size], fabric.global_rank % self.size

        def parted(loader: Loader) -> Loader:
            return Parts(attrs.evolve(loader, multiple=self.size), group, place, self.size)  # type: ignore[misc]

        return attrs.evolve(
            loaders, train=parted(loaders.train), eval=None if loaders.eval is None else parted(loaders.eval)
        )

    def fit(self, model: "nn.Module") -> None:
        """Refuse a network whose attention cannot be shared.

        Raises:
            RecipeError: it is not ours, or its heads cannot be divided.
        """
        config: Any = model.base.config.get_text_config()  # type: ignore[union-attr,operator]
        if config._attn_implementation != "packed":
            raise RecipeError(
                f"sequence: needs the attention `packed`, but the model uses {config._attn_implementation}; set "
                "model.attn_implementation to auto"
            )
        if config.num_attention_heads % self.size:
            raise RecipeError(f"sequence.size: the model's {config.num_attention_heads} attention heads cannot be "
                              f"divided by {self.size}")  # fmt: skip


@attrs.frozen(eq=False)
class Parts:
    """A loader of parts of rows."""

    whole: Loader
    group: Any
    place: int
    size: int

    def start(self) -> Position:
        """Return the position before the first row."""
        return self.whole.start()

    def rows(self, epochs: int) -> int | None:
        """Return how many rows `epochs` passes hold."""
        return self.whole.rows(epochs)

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield parts of micro-batches without end, each with the position after it."""
        return ((self.part(batch), after) for batch, after in self.whole.batches(position))

    def one_pass(self) -> Iterator[Batch]:
        """Yield parts of the micro-batches of one pass."""
        return map(self.part, self.whole.one_pass())

    def part(self, batch: Batch) -> Batch:
        """Return this rank's columns of a batch, with what is predicted from them.

        `cu_seqlens` and `max_seqlen` stay those of whole rows, which attention works on.
        """
        width = batch["input_ids"].shape[1]
        each = width // self.size
        first = self.place * each
        row, column = batch["supervised"] // width, batch["supervised"] % width
        mine = (first <= column) & (column < first + each)
        counts = int(mine.sum()) if batch["weight"] else 0
        tokens = int((batch["row_lengths"] - first).clamp(0, each).sum()) if batch["tokens"] else 0
        cut = {
            name: batch[name][:, first : first + each].contiguous() for name in ("input_ids", "labels", "position_ids")
        }
        return cut | {
            "cu_seqlens": batch["cu_seqlens"], "max_seqlen": batch["max_seqlen"], "max_token": batch["max_token"],
            "supervised": (row * each + column - first)[mine], "targets": batch["targets"][mine],
            "weight": counts, "supervised_tokens": counts, "tokens": tokens, "sequence_group": self.group,
        }  # fmt: skip
