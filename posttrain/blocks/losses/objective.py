"""Names for losses of preference pairs, and weighted sums of them. The losses themselves stand in preference.py.

Nothing heavy is imported here, so that recipes are validated without torch.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs

from posttrain.errors import RegistryError
from posttrain.registry import suggest

if TYPE_CHECKING:
    from torch import Tensor


class LossFunction(Protocol):
    """A loss of pairs, with options as keyword arguments."""

    def __call__(self, policy: "Tensor", reference: "Tensor", lengths: "Tensor", **options: Any) -> "Tensor":
        """Return the loss of each pair, [pairs]."""


@attrs.frozen
class PreferenceLoss:
    """A registered loss."""

    function: LossFunction
    needs_reference: bool
    over_step: bool
    """Whether a pair's loss depends on the other pairs: then it is worked out over all pairs of a step."""
    averages: bool
    """Whether its rewards are means over the tokens of a reply, not sums."""

    @property
    def options(self) -> dict[str, Any]:
        """Its keyword arguments, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSSES: dict[str, PreferenceLoss] = {}
NAMED = ("beta", "label_smoothing")
"""Options that are keys of the recipe."""
F = TypeVar("F", bound=Callable[..., Any])


def preference_loss(
    name: str, *, needs_reference: bool = True, over_step: bool = False, averages: bool = False
) -> Callable[[F], F]:
    """Give a function of your own a name that recipes can use: `loss_type: name`.

    Args:
        name: what recipes call it.
        needs_reference: whether it looks at the reference model.
        over_step: whether a pair's loss depends on the other pairs of the step.
        averages: whether its rewards are means over the tokens of a reply, not sums.

    Raises:
        RegistryError: the name is taken by a function of another module.
    """

    def register(function: F) -> F:
        known = LOSSES.get(name)
        if known is not None and inspect.getmodule(known.function) is not inspect.getmodule(function):
            raise RegistryError(f"the preference loss {name!r} exists already; give yours another name")
        LOSSES[name] = PreferenceLoss(function, needs_reference, over_step, averages)
        return function

    return register


@attrs.frozen
class Objective:
    """A weighted sum of losses, with their options."""

    weights: Mapping[str, float]
    options: Mapping[str, Any]
    """Each goes to every loss that takes it."""

    @property
    def losses(self) -> dict[str, PreferenceLoss]:
        """The losses it is made of."""
        return {name: LOSSES[name] for name in self.weights}

    @property
    def needs_reference(self) -> bool:
        """Whether any of them looks at the reference model."""
        return any(loss.needs_reference for loss in self.losses.values())

    @property
    def over_step(self) -> bool:
        """Whether any of them needs all pairs of a step at once."""
        return any(loss.over_step for loss in self.losses.values())

    def takes(self, option: str) -> bool:
        """Whether any of the losses has such an option."""
        return any(option in loss.options for loss in self.losses.values())

    @property
    def beta(self) -> float:
        """The scale of rewards: as given, or else that of the first loss that has one."""
        taken = [loss.options["beta"] for loss in self.losses.values() if "beta" in loss.options]
        return float(self.options.get("beta", taken[0] if taken else 1.0))

    def rewards(self, policy: "Tensor", reference: "Tensor", lengths: "Tensor") -> "Tensor":
        """Return what the losses reward, [pairs, 2]: beta times the gain over the reference, or the log-probability."""
        gain = policy - reference if self.needs_reference else policy
        return self.beta * (gain / lengths if any(loss.averages for loss in self.losses.values()) else gain)

    def metrics(self, policy: "Tensor", reference: "Tensor", lengths: "Tensor") -> dict[str, "Tensor"]:
        """Return means over pairs of rewards, log-probabilities (in nats) and lengths (in tokens), as scalars."""
        rewards = self.rewards(policy, reference, lengths)
        margin = rewards[:, 0] - rewards[:, 1]
        found = {"rewards/margin": margin.mean(), "rewards/accuracy": accuracy(margin)}
        for side, name in enumerate(("chosen", "rejected")):
            found[f"rewards/{name}"] = rewards[:, side].mean()
            found[f"log_probs/{name}"] = policy[:, side].mean()
            found[f"length/{name}"] = lengths[:, side].mean()
        return found

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for what is wrong with names, weights and options."""
        known = ", ".join(LOSSES)
        if not self.weights:
            yield "loss_type", f"names no loss (known: {known})"
        for name, weight in self.weights.items():
            if name not in LOSSES:
                yield "loss_type", f"there is no {name!r}{suggest(name, LOSSES)} (known: {known})"
            elif not weight > 0:
                yield "loss_type", f"the weight of {name} must be > 0, got {weight}"
        if self.weights.keys() - LOSSES.keys():
            return
        if "exo_pair" in self.weights and self.options.get("label_smoothing") == 0:
            yield "label_smoothing", "must be above 0 for exo_pair"
        takes = sorted({option for loss in self.losses.values() for option in loss.options} - {"mean_lengths"})
        for option in self.options.keys() - set(takes):
            key = option if option in NAMED else "loss_args"
            hint = f"{suggest(option, takes)} (it takes: {', '.join(takes) or 'no options'})"
            yield key, f"{' + '.join(self.weights)} takes no {option!r}{hint}"

    def __call__(
        self, policy: "Tensor", reference: "Tensor", lengths: "Tensor", mean_lengths: "Tensor | None" = None
    ) -> "Tensor":
        """Return the loss of each pair, [pairs].

        Args:
            policy, reference, lengths: [pairs, 2], see preference.py.
            mean_lengths: [2], over all pairs of the step; by default over these pairs.
        """
        options = {**self.options, "mean_lengths": mean_lengths}
        terms = [
            weight
            * LOSSES[name].function(
                policy, reference, lengths, **{k: v for k, v in options.items() if k in LOSSES[name].options}
            )
            for name, weight in self.weights.items()
        ]
        return sum(terms[1:], start=terms[0])


def log_sigmoid(x: "Tensor") -> "Tensor":
    """Return log(1 / (1 + exp(-x))) without overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def accuracy(margin: "Tensor") -> "Tensor":
    """Return how often the chosen side wins, a scalar; a tie is half a win."""
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean()
