"""`posttrain plan`: the memory that a recipe takes on each device, found without weights and without a GPU.

Network, loss, backward pass and an optimizer step are run on tensors that have shapes and no numbers (torch's
FakeTensorMode), with every micro-batch full; what is alive is counted operation by operation. What a strategy shards
is divided, and what it gathers or buffers is added.
"""

import warnings
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from posttrain.blocks.batches import Example
from posttrain.blocks.data import Data, PreferenceData
from posttrain.blocks.model import HFModel
from posttrain.blocks.strategy import DDP, FSDP, DeepSpeed
from posttrain.errors import RecipeError
from posttrain.interfaces import Batch
from posttrain.trainer import Trainer
from posttrain.trainers.distill import DistillTrainer

if TYPE_CHECKING:
    from rich.table import Table

BF16 = ("bf16-mixed", "bf16-true")
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

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return sum(self.device.values())


@attrs.frozen
class Traced:
    """What one micro-batch and one optimizer step take, before anything is sharded."""

    trained: int
    frozen: int
    kept: int
    """Bytes of all parameters as they are kept."""
    gradients: int
    optimizer: int
    others: int
    """Bytes of references and teachers."""
    activations: int
    layer: int
    """Parameters of the largest layer."""
    outside: int
    """Parameters outside of layers: embeddings and head."""


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, until they are given up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        known: set[int] = set()
        tree_map_only(Tensor, lambda tensor: known.add(tensor.untyped_storage()._cdata), (args, kwargs))
        tree_map_only(Tensor, lambda tensor: self.note(tensor, known), out)
        self.peak = max(self.peak, self.now)
        return out

    def note(self, tensor: Tensor, known: set[int]) -> None:
        """Count a tensor's storage, unless it was there before."""
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes and key not in known:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """Take a storage out of the count."""
        self.now -= self.sizes.pop(key)


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
    low = compute_bytes(trainer)
    if isinstance(strategy, FSDP):
        ranks = min(strategy.shard_size or world, world)
        for name in ("parameters", "references and teachers", "gradients", "optimizer state"):
            sizes[name] = -(-sizes[name] // ranks)
        sizes["gathered layers"] = low * (2 * traced.layer + traced.outside) + (low + 4) * traced.layer
        if strategy.cpu_offload:
            host |= {"parameters", "gradients", "optimizer state"}
    elif isinstance(strategy, DeepSpeed):
        zero = strategy.config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        for least, name in ((3, "parameters"), (2, "gradients"), (1, "optimizer state")):
            if stage >= least:
                sizes[name] = -(-sizes[name] // world)
        if stage:
            sizes["buckets"] = low * min(int(zero.get("reduce_bucket_size", BUCKET)), traced.trained)
        if stage == 3:
            live = min(int(zero.get("stage3_max_live_parameters", LIVE)), traced.trained + traced.frozen)
            sizes["gathered layers"] = low * live
        if "device" in zero.get("offload_optimizer", {}):
            host |= {"optimizer state", "gradients"}
        if "device" in zero.get("offload_param", {}):
            host.add("parameters")
    elif world > 1 and not isinstance(strategy, DDP):
        sizes["buckets"] = traced.gradients
    return Estimate(
        {name: size for name, size in sizes.items() if name not in host and size},
        {name: size for name, size in sizes.items() if name in host and size},
        traced.trained, traced.frozen,
    )  # fmt: skip


def compute_bytes(trainer: Trainer) -> int:
    """Return the bytes of a number in matrix products."""
    return 2 if precision_of(trainer) in BF16 or str(precision_of(trainer)).startswith("16") else 4


def precision_of(trainer: Trainer) -> str:
    """Return the recipe's precision, or what GPUs get by default."""
    return trainer.precision or ("32-true" if trainer.accelerator == "cpu" else "bf16-mixed")


def trace(trainer: Trainer) -> Traced:
    """Run one step of a recipe on tensors without numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that look for the numbers
        return _trace(trainer)


def _trace(trainer: Trainer) -> Traced:
    import logging

    from lightning.fabric import Fabric

    precision, deepspeed = precision_of(trainer), isinstance(trainer.strategy, DeepSpeed)
    logging.disable(logging.INFO)  # Fabric would announce its precision
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    logging.disable(logging.NOTSET)
    fabric.without_weights, fabric.to_device = True, lambda module: module  # type: ignore[attr-defined,method-assign]
    batch = fullest(trainer)
    with torch.device("meta"):
        network = fabric.strategy.precision.convert_module(trainer.model.build(fabric))
        kept = size_of(network.parameters())
        gradients = size_of(parameter for parameter in network.parameters() if parameter.requires_grad)
        if precision == "bf16-mixed" and (deepspeed or isinstance(trainer.strategy, FSDP)):  # they cast, not autocast
            network = network.to(torch.bfloat16)
        others = {} if answers_are_stored(trainer) else trainer.build_frozen(fabric, network)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for each in (network, *others.values()):
            without_numbers(each)
        counts = {wanted: sum(p.numel() for p in network.parameters() if p.requires_grad == wanted)
                  for wanted in (True, False)}  # fmt: skip
        states = stepped(trainer.optimizer.build(network)) * kept // size_of(network.parameters())
        if deepspeed and precision in BF16:  # bfloat16 beside float32 that the optimizer works in
            kept, gradients, states = 2 * sum(counts.values()), 2 * counts[True], 12 * counts[True]
        activations = peak(trainer, fabric, network, others, faked(batch, mode))
        layers = [module for module in network.modules() if type(module).__name__ in unsplit(network)]
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return Traced(
        trained=counts[True], frozen=counts[False], kept=kept, gradients=gradients, optimizer=states,
        others=sum(size_of(other.parameters()) for other in others.values()), activations=activations,
        layer=max(sizes, default=0), outside=sum(counts.values()) - sum(sizes),
    )  # fmt: skip


def without_numbers(network: nn.Module) -> None:
    """Replace a network's tensors, on the meta device, by fake ones on the CPU; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    trained = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(fake, trained) if isinstance(tensor, nn.Parameter) else fake
                if tensor is not None:
                    held[name] = made[id(tensor)]


def peak(trainer: Trainer, fabric: Any, network: nn.Module, others: dict[str, nn.Module], batch: Batch) -> int:
    """Return the most bytes that are alive in a pass forward and backward, parameters and gradients aside."""

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call]

    def ask(*args: Any, **kwargs: Any) -> Any:
        with fabric.autocast():
            return network(*args, **kwargs)

    ask.module, ask.training = network, True  # type: ignore[attr-defined]
    network.train()
    trainer.run = SimpleNamespace(  # type: ignore[assignment]
        model=ask, frozen=others, fabric=fabric, log=lambda **values: None, to_device=lambda batch: batch, step=0
    )
    try:
        with Alive() as alive:
            if isinstance(trainer, DistillTrainer) and trainer.stored:
                k = trainer.tokens_kept(trainer.run)
                count = len(batch["supervised"])
                batch["teacher_tokens"] = torch.zeros(count, k, dtype=torch.int64)
                batch["teacher_log_probs"] = torch.zeros(count, k)
            (batch,) = trainer.together([batch])
            trainer.loss(batch).backward()  # type: ignore[no-untyped-call]
    finally:
        del trainer.run
    most: int = alive.peak
    return most


def fullest(trainer: Trainer) -> Batch:
    """Return a micro-batch whose every row is as long as can be, and supervised.

    Raises:
        RecipeError: the data block is not one of posttrain's.
    """
    data = trainer.data
    if not isinstance(data, Data):
        raise RecipeError(f"data: {type(data).__name__} does not say how long its rows are; a plan needs that")
    size = trainer.sequence.size if trainer.sequence else 1
    document = np.arange(-(-data.max_length // size)) % 2 + 1, np.ones(-(-data.max_length // size), dtype=bool)
    pairs = isinstance(data, PreferenceData)
    other = document[0][::-1].copy(), document[1]
    rows = [[Example((document, other) if pairs else (document,))] for _ in range(trainer.micro_batch_size)]
    batch = read_by_the_host(data.collate(rows, 0))
    if getattr(trainer, "precompute_reference", False):
        batch["reference_log_probs"] = torch.zeros(len(batch["supervised"]))
    return batch


def answers_are_stored(trainer: Trainer) -> bool:
    """Whether references and teachers are asked before training, and their memory is free again."""
    return bool(getattr(trainer, "stored", False) or getattr(trainer, "precompute_reference", False))


def read_by_the_host(batch: Batch) -> Batch:
    """Return a batch with the bounds of its documents as arrays: attention on CPUs looks at them."""
    branch = {"branch": read_by_the_host(batch["branch"])} if "branch" in batch else {}
    bounds = {name: batch[name].numpy() for name in ("cu_seqlens", "cu_seqlens_k") if name in batch}
    return batch | bounds | branch


def faked(value: Any, mode: FakeTensorMode) -> Any:
    """Return tensors without numbers."""
    if isinstance(value, dict):
        return {key: faked(item, mode) for key, item in value.items()}
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def stepped(optimizer: Any) -> int:
    """Return the bytes that an optimizer keeps after a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return size_of(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def size_of(tensors: Any) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def unsplit(network: nn.Module) -> set[str]:
    """Return the names of the classes of layers."""
    return {name for part in network.modules() for name in getattr(part, "_no_split_modules", None) or ()}


def table(found: Estimate, world: int) -> "Table":
    """Return the estimate for a terminal."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, title=f"GiB on each of {world} device(s)", title_justify="left")
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


def remedies(trainer: Trainer, world: int) -> Iterator[tuple[str, Estimate]]:
    """Yield changes to a recipe that take less memory, and what it takes then."""
    model, strategy = trainer.model, trainer.strategy
    found: list[tuple[str, dict[str, Any]]] = []
    if trainer.micro_batch_size > 1:
        rows = trainer.micro_batch_size * trainer.gradient_accumulation_steps
        found.append((f"micro_batch_size: 1, gradient_accumulation_steps: {rows}", {"micro_batch_size": 1}))
    if isinstance(model, HFModel) and model.activation_checkpointing is not True:
        saving = attrs.evolve(model, activation_checkpointing=True)  # type: ignore[misc]
        found.append(("model.activation_checkpointing: true", {"model": saving}))
    if world > 1 and not isinstance(strategy, FSDP | DeepSpeed):
        found.append(("strategy: fsdp", {"strategy": FSDP()}))
        if isinstance(model, HFModel) and model.activation_checkpointing is not True:
            both = {"strategy": FSDP(), "model": saving}
            found.append(("strategy: fsdp, model.activation_checkpointing: true", both))
    if isinstance(strategy, FSDP) and not strategy.cpu_offload:
        found.append(
            ("strategy.cpu_offload: true", {"strategy": FSDP(shard_size=strategy.shard_size, cpu_offload=True)})
        )
    before = estimate(trainer, world).total
    for label, changes in found:
        changed = estimate(attrs.evolve(trainer, **changes), world)
        if changed.total < 0.99 * before:
            yield label, changed
