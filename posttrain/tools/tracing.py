"""One step of a recipe on tensors that have shapes and no numbers (torch's FakeTensorMode): what it takes, unsharded.

Network, loss, backward pass and an optimizer step are run with every micro-batch full; what is alive is counted
operation by operation. So it holds for a network, a loss or an optimizer of your own.
"""

import copy
import logging
import warnings
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.batch import Batch, Extra
from posttrain.blocks.data.data import Data
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.layout import Example
from posttrain.blocks.models.quantized.sizes import Group, groups
from posttrain.blocks.parallel.sharding import replace_tensors, units, weightless
from posttrain.blocks.parallel.strategy import FSDP, DeepSpeed
from posttrain.blocks.rollouts.prompts import PromptData
from posttrain.errors import RecipeError
from posttrain.interfaces import AgentBlock
from posttrain.run import Run
from posttrain.runtime.launch import silence_libraries
from posttrain.tools.alive import Alive
from posttrain.tools.twin.stand_ins import Sampling
from posttrain.tools.vision.seen import UNKNOWN, constants, faked, fullest_of_images, prompt_of_images
from posttrain.trainer import Trainer
from posttrain.trainers.distill import DistillTrainer
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.trainers.on_policy_distill import OnPolicyDistillTrainer
from posttrain.trainers.online_dpo import OnlineDPOTrainer

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
    """The most that is alive at once besides; what an optimizer step needs for a moment, where that is more."""
    moments: list[tuple[int, int]]
    """Gradients and activations as backward passes go on, of text and of images, and in the optimizer step: see
    `Alive`."""
    layer: int
    """Bytes of the largest layer, as it is gathered for products."""
    layer_trained: int
    """Parameters of the largest layer that are trained."""
    outside: int
    """Bytes of what is outside of layers, as it is gathered: embeddings and head."""
    whole: int
    """Bytes of all parameters, as they are gathered."""
    groups: list[Group]
    """The parameters by type."""
    operations: int
    """Of matrix products and attention in a pass forward and backward of a micro-batch."""
    tokens: int
    """In that micro-batch, which is as full as can be."""


class Asked(nn.Module):
    """A network under autocast, in place of what Fabric makes of it."""

    def __init__(self, module: nn.Module, fabric: Any) -> None:
        super().__init__()
        self.module, self.fabric = module, fabric

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns."""
        with self.fabric.autocast():
            return self.module(*args, **kwargs)


def trace(trainer: Trainer) -> Traced:
    """Run one step of a recipe on tensors without numbers.

    Raises:
        RecipeError: how much the network computes depends on numbers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that look for the numbers
        try:
            return _trace(trainer)
        except UNKNOWN as error:
            raise RecipeError(
                f"model: how much this model computes depends on what it is given ({error.func}), so there is no plan "
                "of it; run one step, and look at the memory that is logged"
            ) from error


def _trace(trainer: Trainer) -> Traced:
    from lightning.fabric import Fabric

    precision, deepspeed = precision_of(trainer), isinstance(trainer.strategy, DeepSpeed)
    silence_libraries()
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    fabric.to_device = lambda module: module  # type: ignore[method-assign]  # it has no weights to move
    batch, seen = fullest(trainer), images_of_rows(trainer)
    with torch.device("meta"), weightless():
        network = fabric.strategy.precision.convert_module(trainer.model.build(fabric))
        kept = size_of(network.parameters())
        gradients = size_of(parameter for parameter in network.parameters() if parameter.requires_grad)
        states, step = state_of(trainer, network)
        if precision == "bf16-mixed" and (deepspeed or isinstance(trainer.strategy, FSDP)):  # they cast, not autocast
            network = network.to(torch.bfloat16)
        others = {} if answers_are_stored(trainer) else trainer.build_frozen(fabric, network)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, constants():
        for each in (network, *others.values()):  # from the meta device to fake tensors on the CPU
            replace_tensors(each, lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        parts = groups(network)
        counts = {wanted: sum(part.numbers for part in parts if part.trained == wanted) for wanted in (True, False)}
        if deepspeed and precision in BF16:  # bfloat16 beside float32 that the optimizer works in
            states = 4 * counts[True] + states * 4 * counts[True] // gradients
            kept, gradients = gathered(network.parameters(), 2), 2 * counts[True]
        passed = peak(trainer, fabric, network, others, faked(batch, mode))
        activations, moments = passed.peak, passed.moments
        if seen is not None:
            try:
                of_images = peak(trainer, fabric, network, others, faked(seen, mode))
                activations, moments = max(activations, of_images.peak), [*moments, *of_images.moments]
            except UNKNOWN:
                log.warning("what images take is not in the plan: this model does what depends on their numbers")
        activations, moments = max(activations, step), [*moments, (gradients, step)]
        low = 2 if "16" in precision else 4
        layers = [list(layer.parameters()) for layer in units(network)]
        sizes = [gathered(layer, low) for layer in layers]
        trained = [sum(p.numel() for p in layer if p.requires_grad) for layer in layers]
    return Traced(
        trained=counts[True], frozen=counts[False], kept=kept, gradients=gradients, optimizer=states,
        others=sum(size_of(other.parameters()) for other in others.values()), activations=activations,
        moments=moments,
        layer=max(sizes, default=0), layer_trained=max(trained, default=0),
        outside=gathered(network.parameters(), low) - sum(sizes), whole=gathered(network.parameters(), low),
        groups=parts, operations=passed.operations, tokens=batch.tokens,
    )  # fmt: skip


def gathered(parameters: Iterable[nn.Parameter], low: int) -> int:
    """Return the bytes of parameters in products whose numbers have `low` bytes; quantized ones are gathered so."""
    return sum(p.numel() * (low if p.is_floating_point() else p.element_size()) for p in parameters)


def peak(trainer: Trainer, fabric: Any, network: nn.Module, others: dict[str, nn.Module], batch: Batch) -> Alive:
    """Return the most bytes that are alive in a pass forward and backward, parameters and gradients aside, and the
    operations that it takes."""

    alive = Alive()

    def forget(parameter: Tensor) -> None:
        assert parameter.grad is not None
        alive.take(parameter.grad)
        parameter.grad = None

    hooks = [
        parameter.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call]
        for parameter in network.parameters()
        if parameter.requires_grad
    ]
    network.train()
    trainer.run = one_pass(trainer, fabric, network, others)
    try:
        with alive:
            if isinstance(trainer, DistillTrainer) and trainer.stored:
                k, count = trainer.tokens_kept(trainer.run), len(batch.supervised)
                answers = {"teacher_tokens": torch.zeros(count, k, dtype=torch.int64)}
                batch = batch.but(**answers, teacher_log_probs=torch.zeros(count, k))
            batches = [Batch.of(batch) for batch in trainer.together([batch])]
            with trainer.run.metrics.counting(batches[0], trainer.totals(batches)) as counted:
                trainer.weighed(trainer.terms(counted)).backward()  # type: ignore[no-untyped-call]
    finally:
        del trainer.run
        for hook in hooks:
            hook.remove()
    return alive


def fullest(trainer: Trainer) -> Batch:
    """Return a micro-batch whose every row is as long as can be, and supervised.

    Raises:
        RecipeError: the data block is not one of posttrain's.
    """
    data = trainer.data
    if isinstance(trainer, Sampling):
        return full_groups(trainer)
    if not isinstance(data, Data):
        raise RecipeError(f"data: {type(data).__name__} does not say how long its rows are; a plan needs that")
    size = trainer.sequence.size if trainer.sequence else 1
    row = full_row(trainer, data, -(-data.max_length // size))
    batch = data.collator(None)([row] * trainer.micro_batch_size, 1)
    if getattr(trainer, "precompute_reference", False):
        batch = batch.but(reference_log_probs=torch.zeros(len(batch.supervised)))
    return batch


def full_row(trainer: Trainer, data: Data, length: int) -> list[Example]:
    """Return the examples of a row: one document, or that and a short one where packed documents are computed one by
    one, as it is without half precision or a GPU: what attention gives is then copied to lie end to end."""
    alone, short = data.fullest(length), 2
    by_document = trainer.accelerator == "cpu" or "16" not in precision_of(trainer)
    if data.packing and by_document and len(alone.documents) == 1 and length > 2 * short:
        return [data.fullest(length - short), data.fullest(short)]
    return [alone]


def full_groups(trainer: Sampling, asked: Example | None = None, tokenizer: Any = None) -> Batch:
    """Return a micro-batch of prompts and replies that are as long as can be.

    Args:
        trainer: of the recipe.
        asked: the prompt, with images that were read.
        tokenizer: knows these images; None where tokens mean nothing.
    """
    from posttrain.blocks.rollouts.groups import batch_of
    from posttrain.blocks.rollouts.pairs import pairs_of
    from posttrain.blocks.rollouts.replies import Group, Reply

    tokens, n = trainer.sampler.max_new_tokens, 1
    if not isinstance(trainer, OnPolicyDistillTrainer):
        n = trainer.group_size
    prompt = [1 + i % 2 for i in range(trainer.data.max_length if isinstance(trainer.data, Data) else 1)]
    images: list[dict[str, Any]] = []
    if asked is not None:
        prompt, images = asked.documents[0][0].tolist(), asked.values[IMAGES][0]
    said = tokens
    if isinstance(trainer, GRPOTrainer) and (environment := trainer.environment) is not None:
        begun = len(prompt) if isinstance(environment, AgentBlock) else 0  # of what max_tokens limits
        tokens += max(0, environment.max_tokens - begun)
        said = min(tokens, trainer.longest)
    drawn = [i >= tokens - said for i in range(tokens)]
    replies = [Reply([1 + (i >> bit) % 2 for bit in range(tokens)], [0.0] * tokens, True, drawn) for i in range(n)]
    known: dict[str, Any] = {"rewards": [float(i) for i in range(n)], "advantages": [0.0] * n, "images": images}
    group = Group(0, prompt, {}, [], replies, **known)
    groups = [group] * trainer.micro_batch_size
    if isinstance(trainer, OnlineDPOTrainer):
        return pairs_of(groups, tokenizer)
    if isinstance(trainer, OnPolicyDistillTrainer):
        return batch_of(groups, tokenizer, packing=True, mask_truncated=False)
    batch = batch_of(groups, tokenizer, packing=trainer.branching, mask_truncated=False)
    zeros = torch.zeros(len(batch.supervised))
    more = {"reference": trainer.beta > 0, "old": trainer.updates > 1}
    return batch.but(**{name: Extra(zeros, "target") for name, wanted in more.items() if wanted})


def images_of_rows(trainer: Trainer) -> Batch | None:
    """Return a micro-batch that is full of images, as the loop would give it to the loss; None if there are none."""
    size, data = trainer.sequence.size if trainer.sequence else 1, trainer.data
    if isinstance(trainer, Sampling) and isinstance(data, PromptData):
        found = prompt_of_images(trainer, data.max_length)
        return full_groups(trainer, *found) if found is not None else None
    made = fullest_of_images(trainer, -(-data.max_length // size)) if isinstance(data, Data) else None
    if made is not None and getattr(trainer, "precompute_reference", False):
        made = made.but(reference_log_probs=torch.zeros(len(made.supervised)))
    return made


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


def state_of(trainer: Trainer, network: nn.Module) -> tuple[int, int]:
    """Return the bytes that a recipe's optimizer keeps for a network on the meta device, as its parameters are kept,
    and what a step needs."""
    shadow = copy.deepcopy(network)
    with FakeTensorMode(allow_non_fake_inputs=True):
        replace_tensors(shadow, lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        return stepped(trainer.optimizer.build(shadow))


def stepped(optimizer: Any) -> tuple[int, int]:
    """Return the bytes that an optimizer keeps after a step, and the most that the next one needs for a moment: of one
    parameter after the other, so that the largest of each group tells."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = size_of(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    for group in optimizer.param_groups:
        for parameter in sorted(group["params"], key=Tensor.numel)[:-1]:
            parameter.grad = None
    with Alive() as alive:
        optimizer.step()
    optimizer.zero_grad()
    return kept, alive.peak


def size_of(tensors: Any) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def precision_of(trainer: Trainer) -> str:
    """Return the recipe's precision, or what GPUs get by default."""
    return trainer.precision or ("32-true" if trainer.accelerator == "cpu" else "bf16-mixed")
