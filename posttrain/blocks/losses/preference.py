"""What preference pairs are worth: the losses of DPO and its relatives, as pure functions.

Each takes, for every pair, the log-probabilities of both replies and gives the loss of each pair; their mean is what
the paper minimizes. One function more is one loss more:

    @preference_loss("mine")
    def mine(policy, reference, lengths, *, beta=0.1):
        chosen, rejected = (policy - reference).unbind(-1)
        return (1 - beta * (chosen - rejected)).relu()

Arguments of all of them:
    policy: float [pairs, 2], the summed log-probabilities in nats of the chosen and of the rejected reply.
    reference: float [pairs, 2], the same under the reference model; not looked at by reference-free losses.
    lengths: float [pairs, 2], the tokens of the replies.
    beta: strength of the tie to the reference model, unless a docstring says otherwise.

Nothing heavy is imported here, so that recipes are validated without torch.
"""

import inspect
import math
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
            policy, reference, lengths: [pairs, 2], see the module's docstring.
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


def _smoothed(margin: "Tensor", label_smoothing: float) -> "Tensor":
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def _margin(policy: "Tensor", reference: "Tensor") -> "Tensor":
    chosen, rejected = (policy - reference).unbind(-1)
    return chosen - rejected


# -- with a reference model -----------------------------------------------------------


@preference_loss("sigmoid")
def sigmoid(
    policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1, label_smoothing: float = 0.0
) -> "Tensor":
    """Direct preference optimization (Rafailov et al., arXiv:2305.18290, eq. 7).

    With `label_smoothing`, the probability that a label is wrong: conservative DPO (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf).
    """
    return _smoothed(beta * _margin(policy, reference), label_smoothing)


@preference_loss("robust")
def robust(
    policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1, label_smoothing: float = 0.0
) -> "Tensor":
    """Robust DPO: unbiased under labels that are flipped with a known probability, `label_smoothing` < 0.5.

    Ray Chowdhury et al., arXiv:2403.00409, section 3.1.
    """
    margin = beta * _margin(policy, reference)
    flipped = -label_smoothing * log_sigmoid(-margin)
    return (-(1 - label_smoothing) * log_sigmoid(margin) - flipped) / (1 - 2 * label_smoothing)


@preference_loss("hinge")
def hinge(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """The hinge loss on the same margin (Zhao et al., SLiC-HF, arXiv:2305.10425; Liu et al., RSO, arXiv:2309.06657)."""
    return (1 - beta * _margin(policy, reference)).relu()


@preference_loss("ipo", averages=True)
def ipo(
    policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1, average: bool = True
) -> "Tensor":
    """Identity preference optimization (Azar et al., arXiv:2310.12036, eq. 17; `beta` is its tau).

    Log-probabilities are averaged over the tokens of a reply, as in the authors' own experiments and in TRL, so that
    the target 1 / (2 beta) means the same for long and short replies; `average=False` sums them, as eq. 17 is written.
    """
    margin = _margin(policy / lengths, reference / lengths) if average else _margin(policy, reference)
    return (margin - 1 / (2 * beta)) ** 2


@preference_loss("exo_pair")
def exo_pair(
    policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> "Tensor":
    """Efficient exact optimization for two replies: the reverse divergence from softened labels.

    Ji et al., arXiv:2402.00856, eq. 16; `label_smoothing` is its epsilon and must be above 0.
    """
    margin = beta * _margin(policy, reference)
    chosen = margin.sigmoid() * (log_sigmoid(margin) - math.log1p(-label_smoothing))
    return chosen + (-margin).sigmoid() * (log_sigmoid(-margin) - math.log(label_smoothing))


@preference_loss("nca_pair")
def nca_pair(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """Noise contrastive alignment for two replies (Chen et al., arXiv:2402.05369, section 4.1)."""
    chosen, rejected = (beta * (policy - reference)).unbind(-1)
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@preference_loss("bco_pair")
def bco_pair(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """Binary classifier optimization on pairs (Jung et al., arXiv:2404.04656, section 4), its reward shift left out."""
    chosen, rejected = (beta * (policy - reference)).unbind(-1)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


@preference_loss("sppo_hard")
def sppo_hard(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """Self-play preference optimization, winning probabilities 1 and 0 (Wu et al., arXiv:2405.00675, eq. 4.7)."""
    chosen, rejected = (policy - reference).unbind(-1)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@preference_loss("aot", over_step=True)
def aot(
    policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1, label_smoothing: float = 0.0
) -> "Tensor":
    """Alignment via optimal transport, paired (Melnyk et al., arXiv:2406.05882, section 3).

    The sorted margins of the policy are compared with those of the reference: each pair's loss is that of its
    quantile, so it depends on all pairs of the step.
    """
    ours, theirs = ((chosen - rejected) for chosen, rejected in (x.unbind(-1) for x in (policy, reference)))
    order = ours.argsort()
    margin = ours[order] - theirs.sort().values
    losses = _smoothed(beta * margin, label_smoothing)
    return losses[order.argsort()]  # back to the order of the pairs


@preference_loss("apo_zero")
def apo_zero(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """Anchored preference optimization where chosen replies are better than the model's (D'Oosterlinck et al.).

    arXiv:2408.06266, eq. 7: the likelihood of the chosen reply goes up, that of the rejected one down.
    """
    chosen, rejected = (beta * (policy - reference)).unbind(-1)
    return (1 - chosen.sigmoid()) + rejected.sigmoid()


@preference_loss("apo_down")
def apo_down(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """Anchored preference optimization where chosen replies are worse than the model's (D'Oosterlinck et al.).

    arXiv:2408.06266, eq. 8: both likelihoods go down, that of the rejected reply more.
    """
    chosen, rejected = (beta * (policy - reference)).unbind(-1)
    return chosen.sigmoid() + (1 - (chosen - rejected).sigmoid())


@preference_loss("discopop")
def discopop(
    policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1, tau: float = 0.05
) -> "Tensor":
    """The log-ratio modulated loss that was found by search (Lu et al., DiscoPOP, arXiv:2406.08414, eq. 5)."""
    margin = beta * _margin(policy, reference)
    exponential = (margin / tau).sigmoid()
    return (1 - exponential) * -log_sigmoid(margin) + exponential * (-margin).exp()


@preference_loss("sigmoid_norm", averages=True)
def sigmoid_norm(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """DPO on log-probabilities averaged over the tokens of a reply (Tulu 3, Lambert et al., arXiv:2411.15124)."""
    return -log_sigmoid(beta * _margin(policy / lengths, reference / lengths))


# -- without one ----------------------------------------------------------------------


@preference_loss("sft", needs_reference=False)
def sft(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, mean_lengths: "Tensor | None" = None) -> "Tensor":
    """The negative log-likelihood per token of the chosen replies, to be mixed with other losses.

    As in supervised fine-tuning, every token of the step counts the same: a pair's share is its summed negative
    log-likelihood over the mean length of the chosen replies (Pang et al., arXiv:2404.19733, have the mix, as do
    Wang et al., MPO, arXiv:2411.10442).
    """
    mean = lengths.mean(0) if mean_lengths is None else mean_lengths
    return -policy[:, 0] / mean[0]


@preference_loss("orpo", needs_reference=False, averages=True)
def orpo(policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 0.1) -> "Tensor":
    """Odds-ratio preference optimization (Hong et al., arXiv:2403.07691, eq. 6 and 7; `beta` is its lambda).

    The mean negative log-likelihood of the chosen reply, plus `beta` times the log-sigmoid of the log odds ratio.
    """
    averages = policy / lengths
    log_odds = averages - (-averages.clamp(max=-1e-7).expm1()).log()  # log p / (1 - p)
    chosen, rejected = log_odds.unbind(-1)
    return -averages[:, 0] - beta * log_sigmoid(chosen - rejected)


@preference_loss("simpo", needs_reference=False, averages=True)
def simpo(
    policy: "Tensor", reference: "Tensor", lengths: "Tensor", *, beta: float = 2.0, gamma: float = 1.0
) -> "Tensor":
    """Simple preference optimization (Meng et al., arXiv:2405.14734, eq. 6).

    The reward is `beta` times the mean log-probability, and should differ by the margin `gamma`.
    """
    chosen, rejected = (policy / lengths).unbind(-1)
    return -log_sigmoid(beta * (chosen - rejected) - gamma)
