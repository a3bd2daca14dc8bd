"""The training loop, and what a trainer may override: `loss` or `step`.

The order inside the loop is a contract: fetch, step, count, evaluate, log, save.
"""

import itertools
import math
import signal
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import attrs
from attrs.validators import ge, gt, optional

from posttrain import hooks
from posttrain.blocks.checkpoints.checkpoint import HuggingFace, Resume
from posttrain.blocks.loggers.logger import JSONL, Console, TensorBoard
from posttrain.blocks.optimizer import AdamW, torch_optimizer
from posttrain.blocks.parallel.strategy import Auto, DeepSpeed
from posttrain.blocks.scheduler import Cosine
from posttrain.blocks.tokenizers.tokenizer import HFTokenizer
from posttrain.errors import RecipeError, TrainingError
from posttrain.interfaces import (
    Batch,
    CallbackBlock,
    CheckpointBlock,
    DataBlock,
    Loader,
    Loaders,
    LoggerBlock,
    ModelBlock,
    OptimizerBlock,
    Position,
    Preparable,
    SchedulerBlock,
    SequenceBlock,
    StrategyBlock,
    TokenizerBlock,
)  # fmt: skip
from posttrain.registry import default, key
from posttrain.run import Metrics, Run
from posttrain.runtime import crash, folder
from posttrain.runtime.identity import identity
from posttrain.runtime.launch import all_reduce, make_fabric, reseed
from posttrain.runtime.signals import Signals
from posttrain.runtime.watchdog import Watchdog
from posttrain.values import as_data, problems

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor, nn


def _takes_parts(trainer: "Trainer", attribute: Any, value: Any) -> None:
    if value is not None and not trainer.cuts_rows:
        raise ValueError(f"{type(trainer).__name__} needs whole rows on a device")


def _can_skip(trainer: "Trainer", attribute: Any, value: Any) -> None:
    if value == "skip" and isinstance(trainer.strategy, DeepSpeed):
        raise ValueError("DeepSpeed's engine makes its updates by itself: only `stop` is possible")


THEIRS = {
    "compute_loss": "loss(self, batch)", "training_step": "loss(self, batch)", "prediction_step": "evaluate(self)",
    "configure_optimizers": "an optimizer block", "create_optimizer": "an optimizer block",
}  # fmt: skip
"""Methods that trainers of transformers, TRL and Lightning override -> what does it here."""


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
    sequence: SequenceBlock | None = key(None, check=_takes_parts)
    """How several devices share rows that are too long for one: `{type: ulysses, size: 8}`."""
    checkpoint: list[CheckpointBlock] = key(factory=lambda: [Resume(), HuggingFace()])
    """What to save, and when."""
    logger: list[LoggerBlock] = key(factory=lambda: [Console(), TensorBoard(), JSONL()])
    """Where metrics go."""
    callbacks: list[CallbackBlock] = key(factory=list, also=("callback",))
    """Blocks whose marked methods run before or after methods of the trainer or of other blocks."""
    code: list[Path] = key(factory=list)
    """Python files with blocks of your own, imported before the recipe is read; from Python, import them yourself."""

    output_dir: Path = key(Path("out"), convert=Path)
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
    on_nonfinite: Literal["stop", "skip"] = key("stop", check=_can_skip)
    """When a loss or a gradient is not finite: stop the run, or leave the update out, count it and keep its rows in
    `skipped-rows.jsonl`; then the host waits for the device at every step."""
    hang_after: float = key(1800.0, check=gt(0))
    """Seconds without any progress after which a run of several ranks ends, and names the one the others wait for."""
    seed: int = key(42, check=ge(0))
    """Of initial weights, data order and dropout."""
    accelerator: str = "auto"
    """`cpu`, `cuda`, `mps`, or what there is."""
    devices: int | str = "auto"
    """Devices per node: a number, or what the launcher says."""
    num_nodes: int = key(1, check=gt(0))
    """Machines."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"] | None = None
    """Of the arithmetic; 32-true on CPUs and bf16-mixed on GPUs unless given. With bf16-true weights have 8 bits, too:
    a step that changes one by less than 1/512 of it is lost, as most are at learning rates of 1e-5."""

    run: Run = attrs.field(init=False, repr=False)
    cuts_rows: ClassVar[bool] = False
    """Whether `loss` is a sum over positions, so that it may be given a part of a row (`sequence`)."""

    def __init_subclass__(cls) -> None:
        """Refuse a trainer that is written for another library: what it overrides would never be called.

        Raises:
            TypeError: it defines a method of theirs, and none of ours.
        """
        super().__init_subclass__()
        for name in THEIRS.keys() & vars(cls).keys():
            if not {"loss", "step"} & vars(cls).keys():
                raise TypeError(f"{cls.__name__} defines {name}, which is never called here: define {THEIRS[name]}")

    # -- what a trainer overrides ---------------------------------------------------

    def loss(self, batch: Batch) -> "Tensor":
        """Return the loss of one micro-batch: a mean over what `batch["weight"]` counts."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch) or step(batches)")

    def step(self, batches: list[Batch]) -> "Tensor":
        """Take one optimizer step on all its micro-batches, and return its loss.

        Each micro-batch counts by its weight over the weights of all micro-batches and ranks, so the
        gradient is that of one large batch however the step was cut. With several ranks the result
        is this rank's part of the loss; the parts add up to it.
        """
        run, fabric = self.run, self.run.fabric
        batches = list(self.together(batches))
        total = self.total_weight(batches)
        losses = []
        for i, micro_batch in enumerate(batches, start=1):
            with (
                fabric.no_backward_sync(run.model, enabled=i < len(batches)),
                run.metrics.counting(micro_batch, total) as (batch, share),
            ):
                loss = self.loss(batch) * share
                fabric.backward(loss * fabric.world_size, model=run.model)  # strategies average over ranks
            losses.append(loss.detach())
        norm = self.strategy.update(run, self.max_grad_norm)
        if norm is not None:
            run.log(grad_norm=norm)
        if run.leaves_out(norm):
            crash.skip(self, batches)
        run.scheduler.step()
        return sum(losses[1:], start=losses[0])

    def total_weight(self, batches: list[Batch]) -> "float | Tensor":
        """Return the weight of a step, over its micro-batches and all ranks.

        Raises:
            TrainingError: it is 0, so there is nothing to learn from.
        """
        import torch

        run, mine = self.run, float(sum(batch["weight"] for batch in batches))
        total: float | Tensor = mine
        if run.fabric.world_size > 1:
            total = all_reduce(run.fabric, torch.tensor(mine, device=run.fabric.device))
        if mine == 0 and float(total) == 0:  # only then is the device waited for
            raise TrainingError(
                f"step {run.step + 1}: none of its {run.rows_per_step} rows has anything to learn from "
                f"(rows from {run.position} on); look at them with `posttrain show --data`"
            )
        return total

    def together(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return the micro-batches of a step or of an evaluation, with what their loss must know of all of them.

        Args:
            batches: on the device; they can be iterated over more than once.
        """
        return batches

    # -- the loop -------------------------------------------------------------------

    def train(self, callbacks: Iterable[CallbackBlock] = ()) -> Run:
        """Train from the recipe, or go on from the newest checkpoint in the run's folder.

        Args:
            callbacks: more of them, for this run only; marked functions will do.

        Raises:
            RecipeError: values that contradict each other or the machine.
            PosttrainError: data, checkpoint or training cannot go on; the message says why.
        """
        if found := [f"{'.'.join(map(str, where))}: {message}" for where, message in problems(self)]:
            raise RecipeError("\n".join(found))
        with hooks.bound(self, [*self.callbacks, *callbacks]):
            self.run = self.setup()
            self.run.identity = partial(identity, self)
            with folder.claimed(self.run, self.resume):
                for checkpoint in self.checkpoint:
                    checkpoint.load(self.run)
                self.run.first_step = self.run.step
                with folder.logged(self.run, self.logger), crash.reported(self):
                    self.fit()
                self.run.fabric.barrier()  # no rank leaves while another is still writing
        return self.run

    def fit(self) -> None:
        """Take every step that is left, then finish: evaluate, log, save."""
        run, signals, groups = self.run, Signals(), self.groups()
        with signals.caught(), run.watchdog.watching():
            run.model.train()
            while run.step < run.max_steps and run.stop is None:
                reseed(self.seed, run.step, run.fabric.global_rank)
                batches, position = next(groups)
                lr = float(run.scheduler.get_last_lr()[0])
                loss = self.step(batches)
                self.count(batches, position, loss=loss, lr=lr)
                if self.evaluation_due():
                    self.evaluate()
                if run.step % self.log_every == 0:
                    run.flush()
                self.save(at_end=False)
                run.stop = run.stop or self.reason_to_stop(signals)
            run.status = "interrupted" if run.signal or self.stopped_short() else "finished"
            run.flush()
            self.save(at_end=True)

    def prepare(self) -> dict[str, Any]:
        """Do what can be done ahead of the run, such as tokenizing, and return the ledger.

        Raises:
            RecipeError: the data block has nothing to prepare.
        """
        if not isinstance(self.data, Preparable):
            raise RecipeError(f"data: {type(self.data).__name__} has no method prepare(), which this command needs")
        ledger: dict[str, Any] = self.data.prepare(self.tokenizer.build(self.model)).ledger
        return ledger

    def setup(self) -> Run:
        """Build every block, in the order in which they need one another."""
        fabric = make_fabric(
            accelerator=self.accelerator, devices=self.devices, num_nodes=self.num_nodes,
            precision=self.precision, strategy=self.strategy.build(),
        )  # fmt: skip
        tokenizer = self.tokenizer.build(self.model)
        loaders = self.load_data(fabric, tokenizer, self.data)
        ranks = max(1, fabric.world_size // (self.sequence.size if self.sequence else 1))
        rows_per_step = self.micro_batch_size * self.gradient_accumulation_steps * ranks
        max_steps = self.horizon(loaders.train, rows_per_step)
        reseed(self.seed, -1, 0)  # the same initial weights on every rank
        model = self.model.build(fabric)
        if self.sequence:
            self.sequence.fit(model)
        frozen = self.build_frozen(fabric, model)
        model, optimizer = self.strategy.setup(fabric, model, self.optimizer)
        scheduler = self.scheduler.build(torch_optimizer(optimizer), max_steps)
        return Run(
            fabric=fabric, strategy=self.strategy, output_dir=self.output_dir, model=model, frozen=frozen,
            tokenizer=tokenizer, loaders=loaders, optimizer=optimizer, scheduler=scheduler, max_steps=max_steps,
            rows_per_step=rows_per_step, recipe=as_data(self), position=loaders.train.start(),
            rows_per_epoch=loaders.train.rows(1),
            skips=self.on_nonfinite == "skip" or fabric.strategy.precision.precision == "16-mixed",
            watchdog=Watchdog(fabric.global_rank, fabric.world_size, self.hang_after, partial(crash.report, self)),
        )  # fmt: skip

    def load_data(self, fabric: "Fabric", tokenizer: Any, data: DataBlock) -> Loaders:
        """Return the loaders of a data block for this rank; ranks that share rows are one reader."""
        size = self.sequence.size if self.sequence else 1
        rank, ranks = fabric.global_rank // size, max(1, fabric.world_size // size)
        loaders = data.build(tokenizer, self.micro_batch_size, rank, ranks, self.seed)
        return self.sequence.loaders(loaders, fabric) if self.sequence else loaders

    def build_frozen(self, fabric: "Fabric", model: "nn.Module") -> "dict[str, nn.Module]":
        """Build every model block but `model`: references and teachers, not trained and not wrapped.

        Args:
            fabric: of the run.
            model: the network to train, with its first weights, before the strategy wraps it.
        """
        from posttrain.blocks.models.frozen import Frozen

        blocks = {
            field.name: getattr(self, field.name)
            for field in attrs.fields(attrs.resolve_types(type(self)))
            if ModelBlock in (field.type, *get_args(field.type)) and field.name != "model"
        }
        return {name: Frozen(block.build(fabric), fabric) for name, block in blocks.items() if block is not None}

    def horizon(self, loader: Loader, rows_per_step: int) -> int:
        """Return the number of optimizer steps; a last step that is not full is filled from the next pass."""
        if self.max_steps is not None:
            return self.max_steps
        rows = loader.rows(self.epochs)
        if rows is None:
            raise RecipeError("max_steps: a streaming source has no length, so the number of steps must be given")
        return math.ceil(rows / rows_per_step)

    def groups(self) -> Iterator[tuple[list[Batch], Position]]:
        """Yield the micro-batches of each step, on the device, and the position after them; a callback may replace
        the run's loader between two steps."""
        run, loader = self.run, None
        while loader is not run.loaders.train:
            loader = run.loaders.train
            batches = loader.batches(run.position)
            while loader is run.loaders.train:
                begin = run.position
                if not (found := list(itertools.islice(batches, self.gradient_accumulation_steps))):
                    break
                group, position = [run.to_device(batch) for batch, _ in found], found[-1][1]
                run.began[run.step + 1] = begin
                yield group, position
                while self.overfit_first_batch:
                    run.began[run.step + 1] = begin
                    yield group, position
        raise TrainingError("there is no training data: every source is empty")

    def count(self, batches: list[Batch], position: Position, loss: "Tensor", lr: float) -> None:
        """Take note that a step is complete."""
        run = self.run
        run.watchdog.beat()
        epoch = position.get("epoch", 0)
        run.position, run.step, run.epoch, run.epoch_ended = position, run.step + 1, epoch, epoch > run.epoch
        run.log(lr=lr, epoch=run.epochs)
        sizes = {name: sum(batch.get(name, 0) for batch in batches) for name in ("tokens", "supervised_tokens")}
        run.metrics.end_step(run.step, loss=loss, **{name: size for name, size in sizes.items() if size})

    def evaluation_due(self) -> bool:
        """Whether to evaluate after the step in hand."""
        last = self.run.step == self.run.max_steps and self.run.loaders.eval is not None
        return last or (self.eval_every is not None and self.run.step % self.eval_every == 0)

    def evaluate(self) -> dict[str, float]:
        """Return and log the weighted means of `loss` and of what it logs, over the evaluation data."""
        import torch

        run = self.run
        if run.loaders.eval is None:
            raise RecipeError("eval_every: there is nothing to evaluate on; give data.eval_split or data.eval_sources")
        outer, run.metrics, weight = run.metrics, Metrics(), 0.0
        run.model.eval()
        with torch.no_grad(), run.unmeasured("evaluating"):
            for batch in self.together(OnDevice(run, run.loaders.eval)):
                run.watchdog.beat()
                weight += batch["weight"]
                with run.metrics.counting(batch, 1.0) as (counted, _):
                    run.log(loss=self.loss(counted))
            found = {f"eval_{name}": value for name, value in run.metrics.averages(weight, run.fabric).items()}
        run.model.train()
        run.metrics = outer
        run.metrics.note(run.step, found)
        return found

    def save(self, at_end: bool) -> None:
        """Let every checkpoint block save if it is time to."""
        with self.run.unmeasured("saving"):
            for checkpoint in self.checkpoint:
                self.run.watchdog.beat()
                checkpoint.save(self.run, at_end)

    def reason_to_stop(self, signals: Signals) -> str | None:
        """Return why the run must end after the step in hand, if it must."""
        run = self.run
        run.signal = signals.agreed(run.fabric)
        if run.signal:
            return f"received {signal.Signals(run.signal).name}"
        return f"stop_after={self.stop_after}" if self.stopped_short() else None

    def stopped_short(self) -> bool:
        """Whether `stop_after` ended the run before its last step."""
        run = self.run
        return self.stop_after is not None and run.step < run.max_steps and run.step - run.first_step >= self.stop_after


@attrs.frozen
class OnDevice:
    """The micro-batches of one pass, on the device, as often as they are asked for."""

    run: Run
    loader: Loader

    def __iter__(self) -> Iterator[Batch]:
        return map(self.run.to_device, self.loader.one_pass())
