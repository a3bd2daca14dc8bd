"""Rewards: what a reply is worth, from a function of your own or from a reward model.

A reward that raises, hangs or gives no finite number is counted and named; its reply is not learned from.
"""

import inspect
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from attrs.validators import gt, optional

from posttrain.blocks.rollouts.replies import Failure, Group, Sample
from posttrain.errors import RegistryError, TrainingError
from posttrain.interfaces import RewardBlock, Scorer
from posttrain.registry import block, key, members, name_of
from posttrain.words import counted

if TYPE_CHECKING:
    from types import FrameType

    from posttrain.run import Run

log = logging.getLogger("posttrain")
F = TypeVar("F", bound=Callable[..., Any])
ENVIRONMENT = "environment"
"""Name of the part of rewards that an environment gives."""
_blocks: dict[Callable[..., Any], type] = {}


@attrs.frozen(kw_only=True, slots=False)
class Scoring:
    """What rewards share."""

    weight: float = 1.0
    """What it is multiplied by in the sum of all rewards. 0 for one that is only looked at."""
    name: str = ""
    """What metrics call it; its type unless given."""


@attrs.frozen(kw_only=True, slots=False)
class Function(Scoring):
    """A reward made of a function."""

    seconds: float | None = key(10.0, check=optional(gt(0)))
    """How long a call may take before it counts as failed; null for as long as it likes."""

    def score(self, sample: Sample, **options: Any) -> float:
        """Return what a reply is worth."""
        raise NotImplementedError

    def build(self, run: "Run") -> Scorer:
        """Return what scores the replies, one at a time."""
        shared = {field.name for field in attrs.fields(Function)}
        fields = [field.name for field in attrs.fields(type(self)) if field.name not in shared]
        options = {name: getattr(self, name) for name in fields}
        if self.seconds is not None and threading.current_thread() is not threading.main_thread():
            log.warning("training is not in the main thread: rewards that hang are waited for, whatever `seconds` says")

        def scored(samples: list[Sample]) -> list[float | Failure]:
            return [self._tried(sample, options) for sample in samples]

        return scored

    def _tried(self, sample: Sample, options: dict[str, Any]) -> float | Failure:
        try:
            with limited(self.seconds):
                return number(self.score(sample, **options))
        except Late:
            return Failure(f"it took longer than {self.seconds:g} s")
        except Exception as error:
            return Failure(f"{type(error).__name__}: {error}")


def reward(name: str) -> Callable[[F], F]:
    """Make a function a reward that recipes can use: `rewards: [{type: name, weight: 0.5}]`.

    It is called with the prompt (text, as the model saw it), the reply (text, without special tokens) and the columns
    of the prompt's row, and returns a number, or True and False. Its keyword arguments become keys of the recipe.
    From Python the function itself will do: `rewards=[shout]`.

    Raises:
        RegistryError: the name is taken by another function.

    >>> @reward("doctest-short")
    ... def short(prompt, reply, row, *, letters: int = 20):
    ...     return len(reply) <= letters
    >>> lookup("reward", "doctest-short")(letters=5).letters
    5
    """

    def register(function: F) -> F:
        def score(self: Function, sample: Sample, **options: Any) -> float:
            found: float = function(sample.prompt, sample.text, sample.row, **options)
            return found

        made = type(function.__name__, (Function,), members(function, score=score))
        _blocks[function] = block("reward", name)(made)
        return function

    return register


def as_rewards(given: Any) -> Any:
    """Return rewards, of which some may be plain functions; those become rewards of their own names.

    Raises:
        RegistryError: a function has no name that a recipe could write.
    """
    return [_as_reward(one) for one in given] if isinstance(given, list | tuple) else given


def _as_reward(given: Any) -> Any:
    if not inspect.isfunction(given):
        return given
    if given not in _blocks:
        if not given.__name__.isidentifier():
            raise RegistryError("a reward needs a name, which a lambda does not have: write it as a function")
        reward(given.__name__)(given)
    return _blocks[given]()


@block("reward", "model")
class ModelReward(Scoring):
    """The number that a reward model gives the conversation: a model for sequence classification with one label.

    Each rank holds a copy of it. It reads the reply as text, with its own tokenizer and chat template.
    """

    name_or_path: str
    """A folder or hub name, such as an export of `type: reward`."""
    batch_size: int = key(16, check=gt(0))
    """Conversations that are read together."""

    def build(self, run: "Run") -> Scorer:
        """Return what scores the replies.

        Raises:
            TrainingError: it cannot be loaded, or has several labels.
        """
        from posttrain.blocks.rollouts.reward_model import Judge

        return Judge(self.name_or_path, self.batch_size, run.fabric.device)


class Late(BaseException):
    """A call took too long. No `Exception`, so that a reward's own handlers let it through."""


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `Late` where the main thread is after so many seconds; elsewhere there is no such limit."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: "FrameType | None") -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def number(value: Any) -> float | Failure:
    """Return a reward as a number, or why it is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return Failure(f"it returned {value!r:.60}, which is no number")
    return found if math.isfinite(found) and not isinstance(value, str) else Failure(f"it returned {value!r:.60}")


def named(rewards: Iterable[RewardBlock]) -> dict[str, RewardBlock]:
    """Return rewards by what metrics call them, all different."""
    found: dict[str, RewardBlock] = {}
    for one in rewards:
        name = one.name or name_of(type(one)) or type(one).__name__
        again = sum(other.partition(" #")[0] == name for other in found)
        found[f"{name} #{again + 1}" if again else name] = one
    return found


def score(
    groups: list[Group], rewards: dict[str, RewardBlock], scorers: dict[str, Scorer], environment: float = 0.0
) -> None:
    """Let every reward say what the replies are worth, and add up what they said.

    Args:
        groups: with their samples.
        rewards: by name.
        scorers: what they have built.
        environment: weight of what an environment has given for its conversations.

    Raises:
        TrainingError: a reward gives another number of numbers than there are replies.
    """
    samples = [sample for group in groups for sample in group.samples]
    for name, scorer in scorers.items():
        try:
            said = list(scorer(samples))
        except TrainingError:
            raise
        except Exception as error:  # one of a user's own block
            said = [Failure(f"{type(error).__name__}: {error}")] * len(samples)
        if len(said) != len(samples):
            raise TrainingError(f"the reward {name!r} gave {counted(len(said), 'number')} for {len(samples)} replies")
        checked = iter([one if isinstance(one, Failure) else number(one) for one in said])
        for group in groups:
            group.parts[name] = [next(checked) for _ in group.samples]
    for group in groups:
        if environment:
            given = [reply.reward for reply in group.replies]
            group.parts[ENVIRONMENT] = [one if isinstance(one, Failure) else number(one) for one in given]
        group.rewards = [_summed(group, i, rewards, environment) for i in range(len(group.samples))]


def _summed(group: Group, i: int, rewards: dict[str, RewardBlock], environment: float) -> float | None:
    weights = {ENVIRONMENT: environment} if environment else {}
    weights |= {name: one.weight for name, one in rewards.items()}
    total = 0.0
    for name, weight in weights.items():
        said = group.parts[name][i]
        if isinstance(said, Failure):
            return None
        total += weight * said
    return total


def first_failure(groups: list[Group]) -> str | None:
    """Return which reward failed first, and why."""
    found = ((name, one) for group in groups for name, part in group.parts.items() for one in part)
    return next((f"{name}: {one.reason}" for name, one in found if isinstance(one, Failure)), None)
