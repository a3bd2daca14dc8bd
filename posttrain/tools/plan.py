"""`posttrain plan`: the memory that a recipe takes on each device, found without weights and without a GPU.

What a step takes is traced (see tracing.py). What a strategy shards is divided; what it gathers or buffers is added.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.models.model import HFModel
from posttrain.blocks.models.quantized.sizes import Group
from posttrain.blocks.parallel.strategy import DDP, FSDP, DeepSpeed
from posttrain.tools.tracing import precision_of, trace
from posttrain.trainer import Trainer

if TYPE_CHECKING:
    from rich.table import Table

BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at a time, unless its configuration says otherwise."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered, unless its configuration says otherwise."""


@attrs.frozen
class Estimate:
    """Bytes on each device, by what they are for."""

    device: dict[str, int]
    host: dict[str, int] = attrs.field(factory=dict)
    """What is kept in the memory of the host, for each device."""
    trained: int = 0
    """Parameters."""
    frozen: int = 0
    groups: list[Group] = attrs.field(factory=list)
    """The parameters by type, before anything is sharded."""
    operations: int = 0
    """Of a micro-batch, forward and backward, with what is computed again; see operations.py."""
    tokens: int = 0
    """In that micro-batch, which is as full as can be."""

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return sum(self.device.values())


def estimate(trainer: Trainer, world: int) -> Estimate:
    """Return what a recipe takes on each of `world` devices.

    Raises:
        RecipeError: the data block or the model block is of a kind that it cannot be found for.
    """
    strategy, traced = trainer.strategy, trace(trainer)
    sizes = {
        "parameters": traced.kept, "references and teachers": traced.others, "gradients": traced.gradients,
        "optimizer state": traced.optimizer, "activations, logits, loss": traced.activations,
    }  # fmt: skip
    host: set[str] = set()
    parts = 1
    """How many devices share what gradients take as they are made; 0 where room for all of them is there before."""
    low = 2 if "16" in precision_of(trainer) else 4  # bytes of a number in matrix products
    if isinstance(strategy, FSDP):
        ranks = min(strategy.shard_size or world, world)
        for name in ("parameters", "references and teachers", "gradients", "optimizer state"):
            sizes[name] = -(-sizes[name] // ranks)
        sizes["gathered layers"] = 2 * traced.layer + traced.outside + (low + 4) * traced.layer_trained
        parts = ranks
        if strategy.cpu_offload:
            host |= {"parameters", "gradients", "optimizer state"}
    elif isinstance(strategy, DeepSpeed):
        parts, zero = 0, strategy.config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        for least, name in ((3, "parameters"), (2, "gradients"), (1, "optimizer state")):
            if stage >= least:
                sizes[name] = -(-sizes[name] // world)
        if stage:
            sizes["buckets"] = low * min(int(zero.get("reduce_bucket_size", BUCKET)), traced.trained)
        if stage == 3:
            numbers = traced.trained + traced.frozen
            live = min(int(zero.get("stage3_max_live_parameters", LIVE)), numbers)
            sizes["gathered layers"] = traced.whole * live // numbers
        if "device" in zero.get("offload_optimizer", {}):
            host |= {"optimizer state", "gradients"}
        if "device" in zero.get("offload_param", {}):
            host.add("parameters")
    elif world > 1:
        parts = 0
        if not isinstance(strategy, DDP):
            sizes["buckets"] = traced.gradients
    if parts and trainer.gradient_accumulation_steps == 1 and "gradients" not in host:
        together = max(alive + made // parts for made, alive in traced.moments)
        sizes["never at the same moment"] = min(0, together - sizes["activations, logits, loss"] - sizes["gradients"])
    return Estimate(
        {name: size for name, size in sizes.items() if name not in host and size},
        {name: size for name, size in sizes.items() if name in host and size},
        traced.trained, traced.frozen, traced.groups, traced.operations, traced.tokens,
    )  # fmt: skip


def table(found: Estimate, world: int) -> "Table":
    """Return the estimate for a terminal."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, title=f"GiB of tensors on each of {world} device(s)", title_justify="left")
    shown.add_column("")
    shown.add_column("device", justify="right")
    if found.host:
        shown.add_column("host", justify="right")
    for name, size in found.device.items():
        shown.add_row(name, gib(size))
    for name, size in found.host.items():
        shown.add_row(name, "", gib(size))
    shown.add_row("total", gib(found.total), *([gib(sum(found.host.values()))] if found.host else []), style="bold")
    return shown


def gib(size: int) -> str:
    """Return bytes as a text, in GiB."""
    return f"{size / 2**30:,.2f}"


def remedies(trainer: Trainer, world: int, before: Estimate) -> Iterator[tuple[str, Estimate]]:
    """Yield changes to a recipe that take less memory than it does, and what it takes then."""
    model, strategy = trainer.model, trainer.strategy
    found: list[tuple[str, dict[str, Any]]] = []
    if trainer.micro_batch_size > 1:
        rows = trainer.micro_batch_size * trainer.gradient_accumulation_steps
        found.append((f"micro_batch_size: 1, gradient_accumulation_steps: {rows}", {"micro_batch_size": 1}))
    saving: dict[str, Any] = {}
    if isinstance(model, HFModel) and model.activation_checkpointing is not True:
        saving = {"model": attrs.evolve(model, activation_checkpointing=True)}  # type: ignore[misc]
        found.append(("model.activation_checkpointing: true", saving))
    if world > 1 and not isinstance(strategy, FSDP | DeepSpeed):
        found.append(("strategy: fsdp", {"strategy": FSDP()}))
        if saving:
            both = {"strategy": FSDP(), **saving}
            found.append(("strategy: fsdp, model.activation_checkpointing: true", both))
    if isinstance(strategy, FSDP) and not strategy.cpu_offload:
        offloading = {"strategy": FSDP(shard_size=strategy.shard_size, cpu_offload=True)}
        found.append(("strategy.cpu_offload: true", offloading))
    for label, changes in found:
        changed = estimate(attrs.evolve(trainer, **changes), world)
        if changed.total < 0.99 * before.total:
            yield label, changed
