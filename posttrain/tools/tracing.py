"""One step of a recipe on tensors that have shapes and no numbers (torch's FakeTensorMode): what it takes, unsharded.

Network, loss, backward pass and an optimizer step are run with every micro-batch full; what is alive is counted
operation by operation. So it holds for a network, a loss or an optimizer of one's own.
"""

import itertools
import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from posttrain.batch import Batch, Extra, Layout
from posttrain.blocks.data.data import Data
from posttrain.blocks.data.encode import apart
from posttrain.blocks.data.rows.refused import Refused
from posttrain.blocks.data.sources import Source
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.images.processor import images_of
from posttrain.blocks.layout import Example
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.parallel.sharding import replace_tensors, units, weightless
from posttrain.blocks.parallel.strategy import FSDP, DeepSpeed
from posttrain.errors import RecipeError
from posttrain.run import Run
from posttrain.runtime.launch import silence_libraries
from posttrain.trainer import Trainer
from posttrain.trainers.distill import DistillTrainer

LOOKED_AT = 64
"""Rows of each source in which images are looked for."""
CONSTANTS = 100_000
"""Numbers in a tensor of whole ones that is computed with while tracing: torch itself knows single ones alone."""
UNKNOWN = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
log = logging.getLogger("posttrain")
BF16 = ("bf16-mixed", "bf16-true")


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


class Asked(nn.Module):
    """A network under autocast, in place of what Fabric makes of it."""

    def __init__(self, module: nn.Module, fabric: Any) -> None:
        super().__init__()
        self.module, self.fabric = module, fabric

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns."""
        with self.fabric.autocast():
            return self.module(*args, **kwargs)


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


def trace(trainer: Trainer) -> Traced:
    """Run one step of a recipe on tensors without numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that look for the numbers
        return _trace(trainer)


def _trace(trainer: Trainer) -> Traced:
    from lightning.fabric import Fabric

    precision, deepspeed = precision_of(trainer), isinstance(trainer.strategy, DeepSpeed)
    silence_libraries()
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    fabric.to_device = lambda module: module  # type: ignore[method-assign]  # it has no weights to move
    batch, seen = fullest(trainer), fullest_of_images(trainer)
    with torch.device("meta"), weightless():
        network = fabric.strategy.precision.convert_module(trainer.model.build(fabric))
        kept = size_of(network.parameters())
        gradients = size_of(parameter for parameter in network.parameters() if parameter.requires_grad)
        if precision == "bf16-mixed" and (deepspeed or isinstance(trainer.strategy, FSDP)):  # they cast, not autocast
            network = network.to(torch.bfloat16)
        others = {} if answers_are_stored(trainer) else trainer.build_frozen(fabric, network)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, constants():
        for each in (network, *others.values()):  # from the meta device to fake tensors on the CPU
            replace_tensors(each, lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        counts = {wanted: sum(p.numel() for p in network.parameters() if p.requires_grad == wanted)
                  for wanted in (True, False)}  # fmt: skip
        states = stepped(trainer.optimizer.build(network)) * kept // size_of(network.parameters())
        if deepspeed and precision in BF16:  # bfloat16 beside float32 that the optimizer works in
            kept, gradients, states = 2 * sum(counts.values()), 2 * counts[True], 12 * counts[True]
        activations = peak(trainer, fabric, network, others, faked(batch, mode))
        if seen is not None:
            try:
                activations = max(activations, peak(trainer, fabric, network, others, faked(seen, mode)))
            except UNKNOWN:
                log.warning("what images take is not in the plan: this model does what depends on their numbers")
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in units(network)]
    return Traced(
        trained=counts[True], frozen=counts[False], kept=kept, gradients=gradients, optimizer=states,
        others=sum(size_of(other.parameters()) for other in others.values()), activations=activations,
        layer=max(sizes, default=0), outside=sum(counts.values()) - sum(sizes),
    )  # fmt: skip


@contextmanager
def constants() -> Iterator[None]:
    """Compute with small tensors of whole numbers meanwhile: the sizes of images decide what a tower does."""
    before = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = CONSTANTS
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = before


def peak(trainer: Trainer, fabric: Any, network: nn.Module, others: dict[str, nn.Module], batch: Batch) -> int:
    """Return the most bytes that are alive in a pass forward and backward, parameters and gradients aside."""

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call]

    network.train()
    trainer.run = one_pass(trainer, fabric, network, others)
    try:
        with Alive() as alive:
            if isinstance(trainer, DistillTrainer) and trainer.stored:
                k, count = trainer.tokens_kept(trainer.run), len(batch.supervised)
                answers = {"teacher_tokens": torch.zeros(count, k, dtype=torch.int64)}
                batch = batch.but(**answers, teacher_log_probs=torch.zeros(count, k))
            batches = [Batch.of(batch) for batch in trainer.together([batch])]
            with trainer.run.metrics.counting(batches[0], trainer.totals(batches)) as counted:
                trainer.weighed(trainer.terms(counted)).backward()  # type: ignore[no-untyped-call]
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
    rows = [[data.fullest(row_length(trainer, data))] for _ in range(trainer.micro_batch_size)]
    return ready(trainer, data.collator(None)(rows, 1))


def row_length(trainer: Trainer, data: Data) -> int:
    """Return the tokens of a document that a rank sees."""
    return -(-data.max_length // (trainer.sequence.size if trainer.sequence else 1))


def ready(trainer: Trainer, batch: Batch) -> Batch:
    """Return a batch as the loop would give it to the loss."""
    batch = read_by_the_host(batch)
    if getattr(trainer, "precompute_reference", False):
        batch = batch.but(reference_log_probs=torch.zeros(len(batch.supervised)))
    return batch


def fullest_of_images(trainer: Trainer) -> Batch | None:
    """Return a micro-batch with as many images as its rows can hold of those of the data; None if there are none."""
    data, model = trainer.data, trainer.model
    if not isinstance(data, Data) or not isinstance(model, HFModel) or not model.sees_images():
        return None
    tokenizer = trainer.tokenizer.build(model)
    row = with_images(data, tokenizer, row_length(trainer, data))
    return ready(trainer, data.collator(tokenizer)([row] * trainer.micro_batch_size, 1)) if row else None


def with_images(data: Data, tokenizer: Any, length: int) -> list[Example]:
    """Return a row that is full of the example with the most images for its length among the first rows of the data;
    none if they have no images."""
    best: tuple[float, Example] | None = None
    encoder, images = data.encoder(tokenizer), images_of(tokenizer)
    if images is None:
        return []
    for source in data.sources:
        rows = [row.values for row, _ in itertools.islice(source.read(source.open()), LOOKED_AT)]
        for found in encoder.encode(rows):
            if isinstance(found, Refused) or max(len(ids) for ids, _ in found.documents) > length:
                continue
            for one in apart(found, encoder.sides, encoder.columns):
                here = with_source(one, source)
                tokens = sum(span["tokens"] for spans in here.values.get(IMAGES, ()) for span in spans)
                if tokens and (best is None or tokens / len(one) > best[0]):
                    best = tokens / len(one), here
    if best is None:
        return []
    documents = tuple((ids, ids != images.token_id) for ids, _ in best[1].documents)  # supervised, as can be
    return [attrs.evolve(best[1], documents=documents)] * max(1, data.row_length // len(best[1]))


def with_source(example: Example, source: Source) -> Example:
    """Return an example whose images know where their rows are."""
    spans = tuple([span | {"source": source} for span in one] for one in example.values.get(IMAGES, ()))
    return attrs.evolve(example, values=example.values | ({IMAGES: spans} if spans else {}))


def faked(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Return a batch without numbers; with images, tokens and their sizes stay known, since networks look at them."""

    def constant(x: Tensor) -> Any:
        return x if x.is_floating_point() else mode.fake_tensor_converter.from_real_tensor(mode, x, make_constant=True)

    def known(layout: Layout) -> dict[str, Any]:
        images = {name: constant(x) for name, x in layout.arguments[IMAGES].values.items()}
        arguments = {**layout.arguments, IMAGES: Extra(images)}
        return {"input_ids": constant(layout.input_ids), "arguments": arguments}

    if IMAGES in batch.arguments:
        branch = batch.branch and attrs.evolve(batch.branch, **known(batch.branch))
        batch = attrs.evolve(batch, branch=branch, **known(batch))
    return batch.map(lambda x: x if isinstance(x, FakeTensor) else mode.from_tensor(x))


def one_pass(trainer: Trainer, fabric: Any, network: nn.Module, others: dict[str, nn.Module]) -> Run:
    """Return a run that can compute a loss: what only the loop needs is not there."""
    absent: Any = None
    wrapped: Any = Asked(network, fabric)
    return Run(
        fabric=fabric, strategy=trainer.strategy, output_dir=trainer.output_dir, model=wrapped, frozen=others,
        tokenizer=absent, loaders=absent, optimizer=absent, scheduler=absent, max_steps=1,
        rows_per_step=trainer.micro_batch_size, recipe={}, position={}, watchdog=absent,
    )  # fmt: skip


def answers_are_stored(trainer: Trainer) -> bool:
    """Whether references and teachers are asked before training, and their memory is free again."""
    return bool(getattr(trainer, "stored", False) or getattr(trainer, "precompute_reference", False))


def read_by_the_host(batch: Batch) -> Batch:
    """Return a batch with the bounds of its documents as arrays: attention on CPUs looks at them."""

    def seen(layout: Layout) -> dict[str, Any]:
        bounds = {"cu_seqlens": layout.cu_seqlens, "cu_seqlens_k": layout.cu_seqlens_k}
        return {name: tensor.numpy() for name, tensor in bounds.items() if tensor is not None}

    branch = None if batch.branch is None else attrs.evolve(batch.branch, **seen(batch.branch))
    return attrs.evolve(batch, branch=branch, **seen(batch))


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


def precision_of(trainer: Trainer) -> str:
    """Return the recipe's precision, or what GPUs get by default."""
    return trainer.precision or ("32-true" if trainer.accelerator == "cpu" else "bf16-mixed")
