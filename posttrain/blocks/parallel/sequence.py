"""Sequence parallelism: ranks share the rows of a micro-batch along their length."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import gt

from posttrain.batch import Batch
from posttrain.errors import RecipeError
from posttrain.interfaces import Loader, Loaders, Position
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
            return ColumnLoader(attrs.evolve(loader, multiple=self.size), group, place, self.size)  # type: ignore[misc]

        held_out = None if loaders.eval is None else parted(loaders.eval)
        return attrs.evolve(loaders, train=parted(loaders.train), eval=held_out)

    def validate(self, model: "nn.Module") -> None:
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
        if model.router_weight:
            raise RecipeError("sequence: model.router_aux_loss is a loss of whole documents; set it to 0")
        if model.separates:
            raise RecipeError("sequence: the model has layers that compute by document, which need whole rows")
        if config.num_attention_heads % self.size:
            raise RecipeError(f"sequence.size: the model's {config.num_attention_heads} attention heads cannot be "
                              f"divided by {self.size}")  # fmt: skip


@attrs.frozen(eq=False)
class ColumnLoader:
    """A loader of some columns of the rows that another one gives."""

    rows_of: Loader
    group: Any
    place: int
    size: int

    def start(self) -> Position:
        """Return the position before the first row."""
        return self.rows_of.start()

    def rows(self, epochs: int) -> int | None:
        """Return how many rows `epochs` epochs hold."""
        return self.rows_of.rows(epochs)

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield this rank's columns of micro-batches without end, each with the position after it."""
        return ((self.columns(batch), after) for batch, after in self.rows_of.batches(position))

    def one_pass(self) -> Iterator[Batch]:
        """Yield this rank's columns of the micro-batches of one epoch."""
        return map(self.columns, self.rows_of.one_pass())

    def columns(self, batch: Batch) -> Batch:
        """Return this rank's columns of a batch, with what is predicted from them."""
        return batch.columns(self.place, self.size, self.group)
