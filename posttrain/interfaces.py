"""What each replaceable part of a run must provide.

Only signatures live here. The loop (`trainer.py`) and the recipe loader know blocks through
these Protocols alone, so a block needs no base class: a class with the right method is enough.
Nothing heavy is imported: recipes are validated against these names without torch.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import attrs

from posttrain.batch import Batch, Term

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.strategy import Strategy
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from posttrain.blocks.rollouts.replies import Failure, Outcome, Reply, Sample, Turn
    from posttrain.run import Run

Position: TypeAlias = dict[str, Any]
"""Where a loader stands, as plain JSON data. It counts rows of all ranks together, so that it
means the same under any number of ranks."""


class Loader(Protocol):
    """Micro-batches for this rank, in an order that is a pure function of seed and position."""

    def start(self) -> Position:
        """Return the position before the first row."""

    def rows(self, epochs: int) -> int | None:
        """Return how many rows `epochs` passes hold, all ranks together; None if unknown (streams)."""

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield micro-batches without end, pass after pass, each with the position that follows it.

        A dict with `weight` and what the loss needs will do instead of a Batch.
        """

    def one_pass(self) -> Iterator[Batch]:
        """Yield each row once, in stored order, as equally many micro-batches on every rank."""


@attrs.frozen
class Loaders:
    """What a data block makes: rows to train on, and perhaps rows to evaluate on."""

    train: Loader
    eval: Loader | None = None
    ledger: dict[str, Any] = attrs.field(factory=dict)
    """Rows and tokens in, dropped, cut and supervised, per source; plain JSON data."""
    identity: Callable[[], dict[str, Any]] = dict
    """Returns what tells the rows of each source from others, such as a checksum: plain JSON data, kept in
    checkpoints so that a run does not go on with other rows. It may take seconds; only rank zero calls it."""


class ModelBlock(Protocol):
    """Makes the network. `name_or_path` also names the tokenizer, unless the recipe names another."""

    @property
    def name_or_path(self) -> str: ...

    def build(self, fabric: "Fabric") -> "nn.Module": ...


class TokenizerBlock(Protocol):
    """Makes the tokenizer, chat template included."""

    def build(self, model: ModelBlock) -> Any: ...


class DataBlock(Protocol):
    """Turns sources into micro-batches."""

    def build(self, tokenizer: Any, micro_batch_size: int, rank: int, world_size: int, seed: int) -> Loaders: ...


class OptimizerBlock(Protocol):
    """Makes the optimizer for the parameters of a model that require gradients."""

    def build(self, model: "nn.Module") -> "Optimizer": ...


class SchedulerBlock(Protocol):
    """Makes the learning-rate schedule; its `step()` is called once per optimizer step."""

    def build(self, optimizer: "Optimizer", max_steps: int) -> "LRScheduler": ...


class StrategyBlock(Protocol):
    """How ranks share the work: a Fabric strategy, or the name of one, and what differs between strategies.

    Subclass `blocks/parallel/strategy.py`'s `BaseStrategy` unless parameters are sharded in a new way.
    """

    @property
    def shards_parameters(self) -> bool: ...
    def build(self) -> "Strategy | str": ...
    def setup(self, fabric: "Fabric", model: "nn.Module", optimizer: OptimizerBlock) -> "tuple[Any, Any]": ...
    def update(self, run: "Run", max_grad_norm: float | None) -> "Tensor | float | None": ...
    def shards(self, run: "Run") -> Iterator[Any]: ...
    def restored(self, run: "Run") -> None: ...
    def full_parameters(self, run: "Run") -> "dict[str, Tensor] | None": ...


class SequenceBlock(Protocol):
    """How ranks share rows along their length; `size` ranks have parts of the same ones."""

    @property
    def size(self) -> int: ...

    def loaders(self, loaders: Loaders, fabric: "Fabric") -> Loaders: ...
    def validate(self, model: "nn.Module") -> None: ...


class CheckpointBlock(Protocol):
    """Loads before the first step; is asked to save after every step and at the end.

    `at_end` is true for the last call of a run, be it finished, interrupted or stopped early.
    """

    def load(self, run: "Run") -> None: ...
    def save(self, run: "Run", at_end: bool) -> None: ...


class Logger(Protocol):
    """Receives the metrics of finished steps; Lightning's loggers (Weights & Biases, MLflow, CSV) fit."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...
    def finalize(self, status: str) -> None: ...


class LoggerBlock(Protocol):
    """Makes a logger, on rank zero only."""

    def build(self, run: "Run") -> Logger: ...


class CallbackBlock(Protocol):
    """Anything; its methods marked with `@before(...)` or `@after(...)` are called (see hooks.py)."""


class Sampler(Protocol):
    """Samples replies with the current weights of the run."""

    def sample(
        self, prompts: list[list[int]], keys: list[tuple[int, ...]], n: int, temperature: float | None = None
    ) -> "list[list[Reply]]":
        """Return n replies to each prompt; a reply is a function of the weights, the prompt, its key and its number.

        Args:
            prompts: token ids.
            keys: of each prompt; random numbers are made from it.
            n: how many replies to each.
            temperature: in place of the block's own; 0 for the likeliest tokens.
        """


@runtime_checkable
class SeeingSampler(Sampler, Protocol):
    """A sampler that can be shown the images of prompts."""

    sees: bool
    """That it can."""

    def sample(
        self,
        prompts: list[list[int]],
        keys: list[tuple[int, ...]],
        n: int,
        temperature: float | None = None,
        images: list[list[dict[str, Any]]] | None = None,
    ) -> "list[list[Reply]]":
        """Return n replies to each prompt, as `Sampler` does.

        Args:
            prompts: token ids, placeholders of images included.
            keys: of each prompt.
            n: how many replies to each.
            temperature: in place of the block's own.
            images: of each prompt, in its order: `picture`, and where its placeholder stands (`at`, `length`). None
                where no prompt has any.
        """


@runtime_checkable
class AheadSampler(Sampler, Protocol):
    """A sampler that can keep sampling from earlier weights while those of the run change."""

    held: bool
    """Whether it does so now."""

    def hold(self, probe: list[int]) -> None:
        """Keep the weights of the run as they are now: until `release`, replies come from them. All ranks call it, and
        may then sample as often as they like, from another thread too.

        Args:
            probe: a prompt, by which it is proven that they were taken.
        """

    def release(self) -> None:
        """Sample from the weights of the run again."""


class SamplerBlock(Protocol):
    """Makes a sampler."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    def build(self, run: "Run") -> Sampler: ...


class Episode(Protocol):
    """One conversation with an environment, which may remember what was said."""

    def step(self, turn: "Turn") -> "Outcome":
        """Return the answer to a turn of the model, and a reward; without an answer, the conversation ends."""


class EnvironmentBlock(Protocol):
    """Makes episodes, in which an environment answers each turn of the policy."""

    @property
    def max_turns(self) -> int:
        """Turns that the policy has at most."""

    @property
    def max_tokens(self) -> int:
        """The most tokens that all turns and answers together may add to a prompt."""

    @property
    def specs(self) -> list[dict[str, Any]]:
        """Tools that the chat template is to list in every prompt, as JSON schemas."""

    @property
    def weight(self) -> float:
        """Weight of the episodes' own rewards in the sum of all rewards; 0 if they give none."""

    def reset(self, row: dict[str, Any]) -> Any:
        """Return a new `Episode` for a row of the data; equal rows and turns must give equal answers."""


@runtime_checkable
class AgentBlock(EnvironmentBlock, Protocol):
    """An environment whose episodes ask the policy themselves, over HTTP. `reset` returns what plays one: a function of
    the address of the policy that returns a reward, and may be a coroutine."""

    @property
    def concurrency(self) -> int:
        """Episodes that are played at a time, on each rank."""

    @property
    def timeout(self) -> float | None:
        """Seconds that an episode may take between two requests; None for as long as it likes."""


class Scorer(Protocol):
    """Judges replies."""

    def __call__(self, samples: "list[Sample]") -> "list[float | Failure]":
        """Return what each reply is worth, or why it cannot be told."""


class RewardBlock(Protocol):
    """Makes a scorer. `weight` is its weight in the sum of all rewards, `name` its name in metrics."""

    @property
    def weight(self) -> float: ...
    @property
    def name(self) -> str: ...
    def build(self, run: "Run") -> Scorer: ...


class SynthBlock(Protocol):
    """A client that generates data: takes requests, plans and runs them, gives their results
    (synth/clients/client.py)."""

    def add_chat_to_batch_task(self, task_name: str, messages: list[dict[str, Any]]) -> int: ...
    def plan(self, task_name: str) -> Any: ...
    def run(self, task_name: str) -> Any: ...
    def iter_responses(self, task_name: str) -> Iterator[dict[str, Any]]: ...


class StepBlock(Protocol):
    """One step from prompts to training data: asks about rows, and says what becomes of them
    (synth/pipelines/step.py)."""

    @property
    def panel(self) -> list[str | None]: ...
    @property
    def sent(self) -> dict[str, Any]: ...
    @property
    def rounds(self) -> int: ...
    @property
    def others(self) -> dict[str, SynthBlock]: ...
    def again(self, chat: Any, reply: Any) -> Any: ...
    def then(self, row: dict[str, Any], replies: list[Any]) -> list[Any]: ...
    def chats(self, row: dict[str, Any]) -> list[Any]: ...
    def fold(self, row: dict[str, Any], replies: list[Any]) -> Iterable[Any]: ...
    def table(self, rows: Iterable[dict[str, Any]]) -> Iterable[Any]: ...
    def facts(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any]: ...


@runtime_checkable
class Adding(Protocol):
    """A network that adds terms of its own to the loss, such as that of a router."""

    terms: dict[str, Term]
    """The terms of the forward passes since it was last cleared."""


@runtime_checkable
class Updated(Protocol):
    """A network that does something after each update, such as moving the biases of its routers."""

    def after_update(self, summed: "Callable[[Tensor], Tensor]", made: bool) -> "dict[str, Tensor]":
        """Return what is to be logged, the same on every rank.

        Args:
            summed: adds a tensor up over ranks.
            made: whether the update was made; else its gradients were not finite, and it was left out.
        """


@runtime_checkable
class Blindfolded(Protocol):
    """A network with parts that only images reach, which it can do without."""

    def without_images(self) -> None:
        """Train nothing that only images would reach; called before optimizer and strategy see the network."""


@runtime_checkable
class Checked(Protocol):
    """A block or trainer that can say, without any effect, what is wrong with its values."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (field, message) for every problem: a missing file, two keys that contradict."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A model block that can say which weights it stands for, without loading them."""

    def fingerprint(self) -> str | None:
        """Return a text that differs where the weights do; None if it cannot tell."""


@runtime_checkable
class Identified(Protocol):
    """A model block that can say with which weights training begins, however they are used then."""

    def content(self) -> str | None:
        """Return a text that differs where the weights do; None if it cannot tell."""


@runtime_checkable
class Preparable(Protocol):
    """A data block whose slow work can be done ahead of a run, by `posttrain prepare`."""

    def prepare(self, tokenizer: Any) -> Any: ...
