"""The training loop, and what a trainer may override: `loss` or `step`.

The order inside the loop is a contract: fetch, step, count, evaluate, log, save.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs.validators import ge, gt, optional

from posttrain import folder, hooks
from posttrain.blocks.checkpoint import HuggingFace, Resume
from posttrain.blocks.logger import JSONL, Console, TensorBoard
from posttrain.blocks.optimizer import AdamW
from posttrain.blocks.scheduler import Cosine
from posttrain.blocks.strategy import Auto
from posttrain.blocks.tokenizer import HFTokenizer
from posttrain.errors import RecipeError, TrainingError
from posttrain.interfaces import (
    Batch, CallbackBlock, CheckpointBlock, DataBlock, LoggerBlock, ModelBlock,
    OptimizerBlock, Position, SchedulerBlock, StrategyBlock, TokenizerBlock,
)  # fmt: skip
from posttrain.launch import make_fabric, reseed
from posttrain.registry import default, key
from posttrain.run import Metrics, Run
from posttrain.signals import Signals
from posttrain.values import as_data, problems

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor, nn


@attrs.define(kw_only=True, slots=False, eq=False)
class Trainer:
    """A recipe that can be trained. Its fields are the keys of the YAML file."""

    model: ModelBlock
    """The network to train."""
    data: DataBlock
    """What to train on."""
    tokenizer: TokenizerBlock = default(HFTokenizer)
    """Text to tokens; the model's own by default."""
    optimizer: OptimizerBlock = default(AdamW)
    """How gradients change parameters."""
    scheduler: SchedulerBlock = default(Cosine)
    """How the learning rate changes over the steps."""
    strategy: StrategyBlock = default(Auto)
    """How several devices share the work."""
    checkpoint: list[CheckpointBlock] = key(factory=lambda: [Resume(), HuggingFace()])
    """What to save, and when."""
    logger: list[LoggerBlock] = key(factory=lambda: [Console(), TensorBoard(), JSONL()])
    """Where metrics go."""
    callbacks: list[CallbackBlock] = key(factory=list, also=("callback",))
    """Blocks whose marked methods run before or after methods of the trainer or of other blocks."""
    code: list[Path] = key(factory=list)
    """Python files with blocks of your own, imported before the recipe is read; from Python, import them yourself."""

    output_dir: Path = Path("out")
    """The run's folder: recipe, metrics, checkpoints."""
    resume: Literal["auto", "never", "force"] = "auto"
    """`auto` goes on from the newest checkpoint of the same recipe and refuses the folder of another;
    `never` starts anew and clears the folder's earlier run; `force` goes on although the recipe differs."""
    epochs: int = key(1, check=gt(0))
    """Passes over the data, unless `max_steps` is given."""
    max_steps: int | None = key(None, also=("train_iters",), check=optional(gt(0)))
    """Optimizer steps of the whole run; the learning-rate schedule ends there."""
    stop_after: int | None = key(None, also=("exit_iteration_this_run",), check=optional(gt(0)))
    """End this process after so many steps, as if interrupted; for debugging and time-limited queues."""
    micro_batch_size: int = key(1, check=gt(0))
    """Rows (packed: full rows of `max_length` tokens) that one device computes at a time."""
    gradient_accumulation_steps: int = key(1, also=("accumulate",), check=gt(0))
    """Micro-batches per device and optimizer step. Cutting a step differently changes no result."""
    max_grad_norm: float | None = key(1.0, also=("gradient_clipping",), check=optional(gt(0)))
    """Clip gradients to this Euclidean norm; null to leave them alone."""
    eval_every: int | None = key(None, also=("eval_interval",), check=optional(gt(0)))
    """Evaluate every so many steps, and once at the end."""
    log_every: int = key(10, also=("train_log_iter_interval", "loss_log_interval"), check=gt(0))
    """Hand metrics to the loggers every so many steps. Every step is recorded; the device is only waited for here."""
    overfit_first_batch: bool = False
    """Train on the first step's data over and over: the loss of a sound set-up falls to almost nothing."""
    seed: int = key(42, check=ge(0))
    """Of initial weights, data order and dropout."""
    accelerator: str = "auto"
    """`cpu`, `cuda`, `mps`, or what there is."""
    devices: int | str = "auto"
    """Devices per node: a number, or what the launcher says."""
    num_nodes: int = key(1, check=gt(0))
    """Machines."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"] | None = None
    """Of the arithmetic; 32-true on CPUs and bf16-mixed on GPUs unless given."""

    run: Run = attrs.field(init=False, repr=False)

    # -- what a trainer overrides ---------------------------------------------------

    def loss(self, batch: Batch) -> "Tensor":
        """Return the loss of one micro-batch: a sum over what it counts, divided by `batch["weight"]`."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch) or step(batches)")

    def step(self, batches: list[Batch]) -> "Tensor":
        """Take one optimizer step on all its micro-batches, and return its loss.

        Each micro-batch counts by its weight over the weights of all micro-batches and ranks, so the
        gradient is that of one large batch however the step was cut. With several ranks the result
        is this rank's part of the loss; the parts add up to it.
        """
        run, fabric = self.run, self.run.fabric
        total = self.total_weight(batches)
        losses = []
        for i, batch in enumerate(batches, start=1):
            with fabric.no_backward_sync(run.model, enabled=i < len(batches)), run.metrics.counting(batch, total) as (
                batch, share,
            ):  # fmt: skip
                loss = self.loss(batch) * share
                fabric.backward(loss * fabric.world_size)  # Fabric's strategies average over ranks
            losses.append(loss.detach())
        if self.max_grad_norm is not None:
            norm = fabric.clip_gradients(
                run.model, run.optimizer, max_norm=self.max_grad_norm, error_if_nonfinite=False
            )
            if norm is not None:
                run.log(grad_norm=norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        return sum(losses[1:], start=losses[0])

    # -- the loop -------------------------------------------------------------------

    def train(self, callbacks: Iterable[CallbackBlock] = ()) -> Run:
        """Train from the recipe, or go on from the newest checkpoint in the run's folder.

        Args:
            callbacks: more of them, for this run only; marked functions will do.

        Raises:
            RecipeError: values that contradict each other or the machine.
            PosttrainError: data, checkpoint or training cannot go on; the message says why.
        """
        self.validate()
        with hooks.bound(self, [*self.callbacks, *callbacks]):
            self.run = self.setup()
            with folder.opened(self.run, self.loggers(), self.resume):
                for checkpoint in self.checkpoint:
                    checkpoint.load(self.run)
                self.run.first_step = self.run.step
                self.fit()
        return self.run

    def fit(self) -> None:
        """Take every step that is left, then finish: evaluate, log, save."""
        run, signals, evaluated = self.run, Signals(), False
        groups = self.groups()
        with signals.caught():
            run.model.train()
            while run.step < run.max_steps and run.stop is None:
                reseed(self.seed, run.step, run.fabric.global_rank)
                group, position = next(groups)
                lr = run.scheduler.get_last_lr()[0]
                loss = self.step(group)
                self.count(position)
                run.metrics.end_step(run.step, group, loss=loss, lr=lr)
                if evaluated := self.due(self.eval_every):
                    self.evaluate(signals)
                if self.due(self.log_every):
                    run.flush()
                for checkpoint in self.checkpoint:
                    checkpoint.save(run, at_end=False)
                run.stop = run.stop or self.reason_to_stop(signals)
            if run.loaders.eval is not None and not evaluated and run.stop is None:
                self.evaluate(signals)
            run.flush()
            for checkpoint in self.checkpoint:
                checkpoint.save(run, at_end=True)
        run.end(signals.received)

    def setup(self) -> Run:
        """Build every block, in the order in which they need one another."""
        fabric = make_fabric(
            accelerator=self.accelerator, devices=self.devices, num_nodes=self.num_nodes,
            precision=self.precision, strategy=self.strategy.build(),
        )  # fmt: skip
        tokenizer = self.tokenizer.build(self.model)
        loaders = self.data.build(
            tokenizer, self.micro_batch_size, fabric.global_rank, fabric.world_size, self.seed
        )
        rows_per_step = self.micro_batch_size * self.gradient_accumulation_steps * fabric.world_size
        max_steps = self.horizon(loaders.train.rows(self.epochs), rows_per_step)
        reseed(self.seed, -1, 0)  # the same initial weights on every rank
        model = self.model.build(fabric)
        optimizer = self.optimizer.build(model)
        scheduler = self.scheduler.build(optimizer, max_steps)
        model, optimizer = fabric.setup(model, optimizer)
        return Run(
            fabric=fabric, output_dir=self.output_dir, model=model, frozen=self.build_frozen(fabric),
            tokenizer=tokenizer, loaders=loaders, optimizer=optimizer, scheduler=scheduler, max_steps=max_steps,
            rows_per_step=rows_per_step, recipe=as_data(self), position=loaders.train.start(),
        )  # fmt: skip

    def build_frozen(self, fabric: "Fabric") -> "dict[str, nn.Module]":
        """Build every model block but `model`: references and teachers, not trained and not wrapped."""
        frozen = {}
        for field in attrs.fields(attrs.resolve_types(type(self))):
            if field.type is ModelBlock and field.name != "model":
                module = getattr(self, field.name).build(fabric).requires_grad_(False).eval()
                frozen[field.name] = fabric.to_device(fabric.strategy.precision.convert_module(module))
        return frozen

    def groups(self) -> Iterator[tuple[list[Batch], Position]]:
        """Yield the micro-batches of each step, on the device, and the position after them."""
        run = self.run
        batches = run.loaders.train.batches(run.position)
        while True:
            found = list(itertools.islice(batches, self.gradient_accumulation_steps))
            if not found:
                raise TrainingError("the training data ended before the last step: give fewer max_steps, or more data")
            group, position = [to_device(batch, run.fabric) for batch, _ in found], found[-1][1]
            yield group, position
            while self.overfit_first_batch:
                yield group, position

    def count(self, position: Position) -> None:
        """Take note that a step is complete."""
        run = self.run
        run.position, run.step, run.epoch = position, run.step + 1, position.get("epoch", 0)

    def evaluate(self, signals: Signals | None = None) -> None:
        """Log the weighted mean of `loss`, and of what it logs, over the evaluation data as `eval_...`."""
        import torch

        run = self.run
        if run.loaders.eval is None:
            raise RecipeError("eval_every is set, but there is nothing to evaluate on: give data.eval_split or data.eval_sources")
        outer, run.metrics = run.metrics, Metrics()
        run.model.eval()
        weights = 0.0
        with torch.no_grad():
            for batch in run.loaders.eval.one_pass():
                if signals is not None and signals.received and run.fabric.world_size == 1:
                    break  # a run that must end now is not evaluated to the end
                weights += float(batch["weight"])
                with run.metrics.counting(to_device(batch, run.fabric), 1.0) as (batch, share):
                    run.log(loss=self.loss(batch))
        run.model.train()
        found = run.metrics.weighted(weights, run.fabric)
        run.metrics = outer
        run.metrics.note(run.step, {f"eval_{name}": value for name, value in found.items()})
