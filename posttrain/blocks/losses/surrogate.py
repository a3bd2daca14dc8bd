"""Names for policy losses, and what they share: replies, divergences, corrections. The losses stand in policy.py.

Nothing heavy is imported here, so that recipes are validated without torch.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import attrs

from posttrain.errors import RegistryError, TrainingError
from posttrain.registry import suggest

if TYPE_CHECKING:
    from torch import Tensor

Advantage = Literal["group", "group_std", "batch_std", "leave_one_out", "batch"]
"""How rewards become advantages (see blocks/rollouts/advantages.py)."""
Over = Literal["tokens", "replies"]


@attrs.frozen(eq=False)
class Replies:
    """Which reply each token of a micro-batch belongs to."""

    index: "Tensor"
    """int64 [n], the number of its reply."""
    lengths: "Tensor"
    """float32 [replies], trained tokens of each."""
    longest: int
    """The most tokens that the sampler lets a reply have."""

    def sums(self, values: "Tensor") -> "Tensor":
        """Return the sum over the tokens of each reply, [n] -> [replies]."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.index, values)

    def means(self, values: "Tensor") -> "Tensor":
        """Return the mean over the tokens of each reply, [n] -> [replies]; 0 for one without any."""
        return self.sums(values) / self.lengths.clamp(min=1)


class PolicyFunction(Protocol):
    """A loss of sampled replies, with options as keyword arguments."""

    def __call__(
        self, new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies, **options: Any
    ) -> "Tensor":
        """Return the loss of each token, [n], or of each reply, [replies]."""


@attrs.frozen
class PolicyLoss:
    """A registered loss."""

    function: PolicyFunction
    over: Over
    advantage: Advantage
    whole: bool
    """Whether what it clips is the ratio of a whole reply."""

    @property
    def options(self) -> dict[str, Any]:
        """Its keyword arguments, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSSES: dict[str, PolicyLoss] = {}
F = TypeVar("F", bound=Callable[..., Any])


def policy_loss(
    *names: str, over: Over = "tokens", advantage: Advantage = "group_std", whole: bool = False
) -> Callable[[F], F]:
    """Give a function of your own a name that recipes can use: `loss_type: name`.

    Args:
        names: what recipes call it.
        over: what it is a mean over, counted over the whole step and all ranks: it returns the loss of each token, or
            of each reply.
        advantage: how rewards become advantages, unless the recipe says otherwise.
        whole: whether what it clips is the ratio of a whole reply (for the metric `policy/clipped` alone).

    Raises:
        RegistryError: the name is taken by a function of another module.
    """

    def register(function: F) -> F:
        for name in names:
            known = LOSSES.get(name)
            if known is not None and inspect.getmodule(known.function) is not inspect.getmodule(function):
                raise RegistryError(f"the policy loss {name!r} exists already; give yours another name")
            LOSSES[name] = PolicyLoss(function, over, advantage, whole)
        return function

    return register


@attrs.frozen
class Surrogate:
    """A policy loss with its options: what is minimized in place of the expected reward."""

    name: str
    given: Mapping[str, Any]
    """Options; None means the loss's own default."""

    @property
    def loss(self) -> PolicyLoss:
        """The registered loss."""
        return LOSSES[self.name]

    @property
    def options(self) -> dict[str, Any]:
        """Its options, with those that were given."""
        return self.loss.options | {name: value for name, value in self.given.items() if value is not None}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for what is wrong with the name and the options."""
        known = ", ".join(LOSSES)
        if self.name not in LOSSES:
            yield "loss_type", f"there is no policy loss {self.name!r}{suggest(self.name, LOSSES)} (known: {known})"
            return
        takes = self.loss.options
        for name, value in self.given.items():
            if name not in takes and value is not None:
                hint = f"{suggest(name, takes)} (it takes: {', '.join(takes) or 'no options'})"
                yield name, f"{self.name} takes no {name!r}{hint}"

    def __call__(self, new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies) -> "Tensor":
        """Return the loss of each token [n] or reply [replies], as `loss.over` says (see policy.py).

        Raises:
            TrainingError: the function returns something of another shape.
        """
        losses = self.loss.function(new, old, advantages, replies, **self.options)
        wanted = len(replies.lengths) if self.loss.over == "replies" else len(new)
        if tuple(losses.shape) != (wanted,):
            raise TrainingError(
                f"the policy loss {self.name!r} is a mean over {self.loss.over}, so it must return [{wanted}] numbers, "
                f"one for each; it returned {list(losses.shape)}"
            )
        return losses

    def clipped(self, new: "Tensor", old: "Tensor", replies: Replies) -> "Tensor":
        """Return for each token whether its ratio is outside of the clip range; none is where nothing is clipped."""
        moved, options = new - old, self.options
        ratio = (replies.means(moved)[replies.index] if self.loss.whole else moved).exp()
        low, high = (options.get(name) for name in ("clip_low", "clip_high"))
        below = ratio < 1 - low if low is not None else ratio < 0
        above = ratio > 1 + high if high is not None else ratio < 0
        return below | above


Kind = Literal["unbiased", "k1", "k2", "k3"]


def divergence_from(reference: "Tensor", new: "Tensor", old: "Tensor", kind: Kind) -> "Tensor":
    """Return an estimate of KL(policy || reference) at each token that the old policy sampled, [n], in nats.

    With r = reference / policy (Schulman, http://joschu.net/blog/kl-approx.html): k1 = -log r, k2 = (log r)^2 / 2,
    k3 = r - 1 - log r. On-policy, k1 and k3 have the value of the divergence on average, but not its gradient: that of
    k1 is 0, k3's that of KL(reference || policy); k2 has the gradient, but not the value. `unbiased`, k3 times the
    ratio new / old, has both, on-policy and off it (DeepSeek-V3.2, arXiv:2512.02556, section 3.1).
    """
    log_r = reference - new
    if kind == "unbiased":
        return (new - old).exp() * (log_r.exp() - 1 - log_r)
    if kind == "k1":
        return -log_r
    return log_r.square() / 2 if kind == "k2" else log_r.exp() - 1 - log_r


Correction = Literal["none", "token", "sequence", "mask"]


def correction(old: "Tensor", sampled: "Tensor", replies: Replies, kind: Correction, cap: float) -> "Tensor":
    """Return what each token's advantage is multiplied by, [n], since the sampler is not quite the policy.

    With w = old / sampled, the ratio of the trainer's probability of a token to the sampler's:
    token: min(w, cap), truncated importance sampling (Yao et al., https://fengyao.notion.site/off-policy-rl).
    sequence: min(product of w over the reply, cap), the unbiased weight of the reply if the cap is not reached.
    mask: w where 1 / cap <= w <= cap, and 0 elsewhere (IcePop, https://ringtech.notion.site/icepop).
    """
    gap = old - sampled
    if kind == "sequence":
        return replies.sums(gap).exp().clamp(max=cap)[replies.index]
    weights = gap.exp()
    if kind == "token":
        return weights.clamp(max=cap)
    if kind == "mask":
        return weights * ((weights >= 1 / cap) & (weights <= cap))
    return weights.new_ones(len(weights))


def bounded(gap: "Tensor", replies: Replies, kind: Correction, cap: float) -> "Tensor":
    """Return for which tokens a correction is not the plain ratio exp(gap), but truncated or masked, bool [n]."""
    if kind == "sequence":
        return replies.sums(gap)[replies.index].exp() > cap
    return gap.abs().exp() > cap if kind == "mask" else gap.exp() > cap
