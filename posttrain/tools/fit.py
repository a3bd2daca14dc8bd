"""`posttrain fit`: the smallest change of a recipe that fits into a device's memory.

Changes are tried from those that leave every step as it is (how it is cut, what is computed again, what waits on the
host) to those that change what is trained. They pile up until the recipe fits; then those that are not needed go again,
the largest first.
"""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from posttrain.blocks.models.model import HFModel
from posttrain.blocks.optimizer import AdamW
from posttrain.blocks.optimizers.blocks import AdamW8bit
from posttrain.blocks.parallel.strategy import FSDP, DeepSpeed
from posttrain.errors import RecipeError
from posttrain.recipes.load import load
from posttrain.tools.plan import Estimate, estimate, gib
from posttrain.trainer import Trainer

SPARE = 0.1
"""Share of a device's memory that allocator and libraries take."""


@attrs.frozen
class Change:
    """What to change in a recipe."""

    name: str
    """Changes of one name replace each other."""
    overrides: tuple[str, ...]
    why: str

    @property
    def shown(self) -> list[str]:
        """The overrides, as a shell takes them."""
        return [shlex.quote(text) for text in self.overrides]


@attrs.frozen
class Fit:
    """A recipe that fits."""

    changes: list[Change]
    before: Estimate
    estimate: Estimate
    world: int


def fit(
    path: Path, overrides: list[str], world: int | None, room: float, offload: bool, tell: Callable[[str], None]
) -> Fit | None:
    """Return the smallest change of a recipe that fits, or None if nothing does.

    Args:
        path: of the recipe.
        overrides: of its keys.
        world: devices; by default what the recipe says.
        room: bytes of a device.
        offload: whether something may wait on the host.
        tell: is told what was tried.

    Raises:
        RecipeError: the recipe is wrong, or cannot be planned.
    """
    real = load(path, overrides)
    world = world or (real.devices if isinstance(real.devices, int) else 1) * real.num_nodes
    usable = room * (1 - SPARE)

    def tried(changes: list[Change]) -> Estimate | None:
        """Return what a recipe with changes takes; None if it does not allow them."""
        try:
            made = load(path, [*overrides, *(text for change in changes for text in change.overrides)])
        except RecipeError:
            return None
        return estimate(made, world)

    before = newest = estimate(real, world)
    tell(f"{gib(before.total):>9} GiB  as it is")
    taken: list[Change] = []
    for change in ladder(real, world, offload) if before.total > usable else ():
        held = [other for other in taken if other.name != change.name]
        found = tried([*held, change])
        if found is None or found.total >= 0.99 * newest.total:
            continue
        taken, newest = [*held, change], found
        tell(f"{gib(found.total):>9} GiB  {' '.join(change.shown)}")
        if newest.total <= usable:
            break
    if newest.total > usable:
        return None
    for change in reversed(taken[:-1]):
        fewer = [other for other in taken if other is not change]
        found = tried(fewer)
        if found is not None and found.total <= usable:
            taken, newest = fewer, found
    return Fit(taken, before, newest, world)


def ladder(trainer: Trainer, world: int, offload: bool) -> Iterator[Change]:
    """Yield changes that may help, the smallest first."""
    model, strategy = trainer.model, trainer.strategy
    rows = trainer.micro_batch_size
    for size in (size for size in range(rows // 2, 0, -1) if rows % size == 0):
        groups = trainer.gradient_accumulation_steps * rows // size
        said = f"micro_batch_size={size}", f"gradient_accumulation_steps={groups}"
        yield Change("rows", said, "the same steps, in more parts")
    if isinstance(model, HFModel) and model.activation_checkpointing is not True:
        yield Change("again", ("model.activation_checkpointing=true",), "the same steps, a third slower")
    if world > 1 and not isinstance(strategy, FSDP | DeepSpeed):
        yield Change("shards", ("strategy=fsdp",), "the same steps, with shards instead of copies")
    if offload and isinstance(model, HFModel) and not model.offload_activations:
        said = "model.activation_checkpointing=true", "model.offload_activations=true"
        yield Change("again", said, "the same steps, what layers keep waits on the host")
    if offload and not isinstance(strategy, DeepSpeed):
        shards = f", shard_size: {strategy.shard_size}" if isinstance(strategy, FSDP) and strategy.shard_size else ""
        waits = (f"strategy={{type: fsdp, cpu_offload: true{shards}}}",)
        yield Change("shards", waits, "the same steps, weights and optimizer wait on the host: slow")
    if isinstance(trainer.optimizer, AdamW) and type(trainer.optimizer) is not AdamW8bit:
        yield Change("optimizer", ("optimizer.type=adamw-8bit",), "nearly the same steps, moments of 8 bits")
    if isinstance(model, HFModel) and model.lora is None:
        said = "model.lora={}", "model.dtype=bfloat16"
        yield Change("base", said, "adapters instead of the weights; they want a rate ten times as high")
    if isinstance(model, HFModel) and model.quantize is None:
        small = "model.dtype=bfloat16", "model.quantize=nf4"
        yield Change("base", small if model.lora else ("model.lora={}", *small), "adapters on a base of 4 bits")
