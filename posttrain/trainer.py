"""The training loop, and what a trainer may override: `loss` or `step`.

The order inside the loop is a contract: fetch, step, count, evaluate, log, save.
"""

import itertools
import math
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import attrs

from posttrain import hooks
from posttrain.batch import Batch, Term
from posttrain.blocks.optimizer import averaged, learning_rates, torch_optimizer
from posttrain.errors import RecipeError, TrainingError
from posttrain.interfaces import (
    Adding,
    Blindfolded,
    CallbackBlock,
    DataBlock,
    Loader,
    Loaders,
    ModelBlock,
    Position,
    Preparable,
    Updated,
)  # fmt: skip
from posttrain.keys import TrainerKeys
from posttrain.run import Run
from posttrain.runtime import crash, folder
from posttrain.runtime.identity import identity
from posttrain.runtime.launch import all_reduce, make_fabric, on_device, reseed
from posttrain.runtime.metrics import Metrics
from posttrain.runtime.signals import Signals
from posttrain.runtime.watchdog import Watchdog
from posttrain.values import as_data, problems

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor, nn


THEIRS = {
    "compute_loss": "loss(self, batch)", "training_step": "loss(self, batch)", "prediction_step": "evaluate(self)",
    "configure_optimizers": "an optimizer block", "create_optimizer": "an optimizer block",
}  # fmt: skip
"""Methods that trainers of transformers, TRL and Lightning override -> what does it here."""


@attrs.define(kw_only=True, slots=False, eq=False)
class Trainer(TrainerKeys):
    """A recipe that can be trained. Its fields are the keys of the YAML file."""

    run: Run = attrs.field(init=False, repr=False)

    def __init_subclass__(cls) -> None:
        """Refuse a trainer that is written for another library: the method that it overrides would never be called.

        Raises:
            TypeError: it defines a method of theirs, and none of ours.
        """
        super().__init_subclass__()
        for name in THEIRS.keys() & vars(cls).keys():
            if not {"loss", "step"} & vars(cls).keys():
                raise TypeError(f"{cls.__name__} defines {name}, which is never called here: define {THEIRS[name]}")

    # -- what a trainer overrides ------------------------------------------------

    def loss(self, batch: Batch) -> "Tensor | dict[str, Term]":
        """Return the loss of a micro-batch: a mean over what `batch["weight"]` counts, or terms with their own counts.

        The loop adds the terms that the network has itself, such as the loss of a router.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(batch) or step(batches)")

    def made(self, batches: list[Batch]) -> list[Batch]:
        """Return the batches that a step trains on; a method that samples replaces those of the data."""
        return batches

    def step(self, batches: list[Batch]) -> "Tensor":
        """Take one step on its micro-batches, and return its loss; it may make several updates on the same ones."""
        return self.update(batches)

    def together(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return the micro-batches of an update or an evaluation; a loss that needs all of them at once adds it here.

        Args:
            batches: on the device; they can be iterated over more than once.
        """
        return batches

    def measured(self, batch: Batch) -> "dict[str, Tensor | Term]":
        """Return what an evaluation measures of a micro-batch: by default the terms of its loss.

        The evaluation's loss is the weighted sum of the terms; one of weight 0 is only reported.
        """
        return self.terms(batch)

    # -- the loop ----------------------------------------------------------------

    def train(self, callbacks: Iterable[CallbackBlock] = ()) -> Run:
        """Train from the recipe, or go on from the newest checkpoint in the run's folder.

        Args:
            callbacks: more of them, for this run only; decorated functions will do.

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
                run.batches, position = next(groups)
                run.began[run.step + 1] = run.position
                run.batches = self.made(run.batches)
                rates = learning_rates(run.optimizer)
                loss = self.step(run.batches)
                self.count(run.batches, position, loss=loss, **rates)
                if self.evaluation_due():
                    self.evaluate()
                if run.step % self.log_every == 0:
                    run.flush()
                self.save(at_end=False)
                run.stop = run.stop or self.reason_to_stop(signals)
            run.status = "interrupted" if run.signal or self.stopped_short() else "finished"
            run.flush()
            self.save(at_end=True)

    def groups(self) -> Iterator[tuple[list[Batch], Position]]:
        """Yield the micro-batches of each step, on the device, and the position after them; a callback may replace
        the run's loader between two steps."""
        run, loader = self.run, None
        while loader is not run.loaders.train:
            loader = run.loaders.train
            batches = loader.batches(run.position)
            while loader is run.loaders.train:
                if not (found := list(itertools.islice(batches, self.gradient_accumulation_steps))):
                    break
                group, position = [run.to_device(batch) for batch, _ in found], found[-1][1]
                yield group, position
                while self.overfit_first_batch:
                    yield group, position
        raise TrainingError("there is no training data: every source is empty")

    def count(self, batches: list[Batch], position: Position, loss: "Tensor", **rates: float) -> None:
        """Close a step: from here on, metrics, checkpoints and `max_steps` count it.

        One step is one fetch of rows, whatever `made` turned them into and however many updates it took. Only the
        schedule counts updates.

        Args:
            batches: those that were trained on.
            position: in the data, after them.
            loss: of the step.
            rates: learning rates, by name.
        """
        run = self.run
        run.watchdog.beat()
        epoch = position.get("epoch", 0)
        run.position, run.step, run.epoch, run.epoch_ended = position, run.step + 1, epoch, epoch > run.epoch
        run.log(**rates, epoch=run.epochs)
        sizes = {name: sum(getattr(batch, name) for batch in batches) for name in ("tokens", "supervised_tokens")}
        run.metrics.end_step(run.step, loss=loss, **{name: size for name, size in sizes.items() if size})

    def save(self, at_end: bool) -> None:
        """Let every checkpoint block save what is due."""
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

    # -- one update --------------------------------------------------------------

    def update(self, batches: list[Batch]) -> "Tensor":
        """Make one optimizer update on all micro-batches of a step, and return its loss.

        Each term of the loss is divided by its count over all micro-batches and ranks, so the gradient is that of one
        large batch however the step was cut. With several ranks the result is this rank's part of the loss; the parts
        add up to it.
        """
        run, fabric = self.run, self.run.fabric
        batches = list(map(Batch.of, self.together(list(map(Batch.of, batches)))))
        totals = self.totals(batches)
        losses = []
        for i, micro_batch in enumerate(batches, start=1):
            with (
                fabric.no_backward_sync(run.model, enabled=i < len(batches)),
                run.metrics.counting(micro_batch, totals) as batch,
            ):
                loss = self.weighed(self.terms(batch))
                fabric.backward(loss * fabric.world_size, model=run.model)  # strategies average over ranks
            losses.append(loss.detach())
        norm = self.strategy.update(run, self.max_grad_norm)
        if norm is not None:
            run.log(grad_norm=norm)
        left_out, network = run.leaves_out(norm), run.model.module
        if left_out:
            crash.skip(self, batches)
        if isinstance(network, Updated):
            run.log(**network.after_update(partial(all_reduce, fabric), made=not left_out))
        run.scheduler.step()
        run.metrics.updates += 1
        return sum(losses[1:], start=losses[0])

    def terms(self, batch: Batch) -> "dict[str, Tensor | Term]":
        """Return the terms of a micro-batch's loss, and those that the network adds."""
        network: Any = self.run.model.module
        adds = isinstance(network, Adding)
        if adds:
            network.terms.clear()
        found = self.loss(batch)
        more = network.terms if adds else {}
        return {**(found if isinstance(found, dict) else {"loss": found}), **more}

    def weighed(self, terms: "dict[str, Tensor | Term]") -> "Tensor":
        """Return the part of a micro-batch in the loss of the step, and log its terms."""
        metrics, parts = self.run.metrics, list["Tensor"]()
        for name, term in terms.items():
            part: Any = metrics.part(term)
            if isinstance(term, Term):
                self.run.log(**{name: term})
                part = part * term.weight
            parts.append(part)
        return sum(parts[1:], start=parts[0])

    def totals(self, batches: list[Batch]) -> "dict[str, float | Tensor]":
        """Return what the terms of an update are divided by: the counts of all micro-batches on all ranks.

        Raises:
            TrainingError: its weight is 0, so there is nothing to learn from.
        """
        run, counts = self.run, [batch.counts for batch in batches]
        mine = {name: float(sum(count[name] for count in counts)) for name in counts[0]}
        found: dict[str, float | Tensor] = dict(mine)
        if run.fabric.world_size > 1:
            sums = all_reduce(run.fabric, on_device(run.fabric, list(mine.values())))
            found = dict(zip(mine, sums.unbind(), strict=True))
        if mine["weight"] == 0 and float(found["weight"]) == 0:  # only then is the device waited for
            raise TrainingError(
                f"step {run.step + 1}: none of its {run.rows_per_step} rows has anything to learn from "
                f"(rows from {run.position} on); look at them with `posttrain show --data`"
            )
        return found

    # -- evaluation --------------------------------------------------------------

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
        outer, run.metrics, counts, weights = run.metrics, Metrics(), Counter[str](), dict[str, float]()
        run.model.eval()
        with torch.no_grad(), run.unmeasured("evaluating"), averaged(run):
            for batch in map(Batch.of, self.together(OnDevice(run, run.loaders.eval))):
                run.watchdog.beat()
                counts.update(batch.counts)
                with run.metrics.counting(batch, defaultdict(lambda: 1.0)) as counted:
                    found = self.measured(counted)
                    run.log(**found)
                weights |= {name: term.weight for name, term in found.items() if isinstance(term, Term) and term.weight}
            means = run.metrics.averages(dict(counts), run.fabric)
        if weights and means:
            more = sum(weight * means[name] for name, weight in weights.items() if name in means)
            means["loss"] = means.get("loss", 0.0) + more
        run.model.train()
        run.metrics, named = outer, {f"eval_{name}": value for name, value in means.items()}
        run.metrics.note(run.step, named)
        return named

    # -- what a run is built of --------------------------------------------------

    def prepare(self) -> dict[str, Any]:
        """Do the data work ahead of the run, such as tokenizing, and return its ledger.

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
        if isinstance(model, Blindfolded) and loaders.ledger.get("total", {}).get("images") == 0:
            model.without_images()
        if self.sequence:
            self.sequence.validate(model)
        frozen = self.build_frozen(fabric, model)
        model, optimizer = self.strategy.setup(fabric, model, self.optimizer)
        scheduler = self.scheduler.build(torch_optimizer(optimizer), max_steps * self.updates_per_step)
        return Run(
            fabric=fabric, strategy=self.strategy, output_dir=self.output_dir, model=model, frozen=frozen,
            tokenizer=tokenizer, loaders=loaders, optimizer=optimizer, scheduler=scheduler, max_steps=max_steps,
            rows_per_step=rows_per_step, recipe=as_data(self), position=loaders.train.start(),
            rows_per_epoch=loaders.train.rows(1),
            skips=self.on_nonfinite == "skip" or fabric.strategy.precision.precision == "16-mixed",
            watchdog=Watchdog(fabric.global_rank, fabric.world_size, self.hang_after, partial(crash.report, self)),
        )  # fmt: skip

    def load_data(self, fabric: "Fabric", tokenizer: Any, data: DataBlock) -> Loaders:
        """Return the loaders of a data block for this rank; ranks that share rows read the same ones."""
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
        """Return the number of steps; a last step that is not full is filled from the next epoch."""
        if self.max_steps is not None:
            return self.max_steps
        part, whole = math.modf(self.epochs)
        rows = loader.rows(int(whole))
        if rows is None:
            raise RecipeError("max_steps: a streaming source has no length, so the number of steps must be given")
        if part:
            rows += round(part * ((loader.rows(int(whole) + 1) or rows) - rows))
        return max(1, math.ceil(rows / rows_per_step))


@attrs.frozen
class OnDevice:
    """The micro-batches of one pass over the data, on the device; it can be iterated over again."""

    run: Run
    loader: Loader

    def __iter__(self) -> Iterator[Batch]:
        return map(self.run.to_device, self.loader.one_pass())
