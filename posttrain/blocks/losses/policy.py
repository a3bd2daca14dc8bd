"""What sampled replies are worth: the losses of GRPO and its relatives, as pure functions.

Each takes the tokens of sampled replies and gives the loss of each token or of each reply; their mean is what is
minimized, over all tokens or replies of the step. To add a loss, write a function:

    @policy_loss("mine", over="tokens", advantage="group")
    def mine(new, old, advantages, replies, *, power=1.0):
        return -advantages * (new - old).exp() ** power

Arguments of all of them:
    new: float [n], the policy's log-probability in nats of each sampled token.
    old: float [n], the same as it was when the reply was sampled, without a gradient. On the first update of a step it
        is `new`, so that every ratio new / old is exactly 1.
    advantages: float [n], how much better than expected the reply of each token is.
    replies: which reply each token belongs to (`replies.sums(x)`, `replies.means(x)`, `replies.lengths`).
    clip_low, clip_high: how far the ratio r = exp(new - old) may leave 1, downwards and upwards, until the gradient is
        cut off where it would lead further away.
    delta: where the advantage is negative, r is also cut at `delta`: two-sided clipping (INTELLECT-2,
        arXiv:2505.07291, eq. 3). None for no such bound.

In the equations A is the advantage, T a reply's tokens, G the replies, and a mean runs over the whole step.
Nothing heavy is imported here, so that recipes are validated without torch.
"""

from typing import TYPE_CHECKING

from posttrain.blocks.losses.surrogate import Replies, policy_loss

if TYPE_CHECKING:
    from torch import Tensor


def _clipped(ratio: "Tensor", advantages: "Tensor", low: float, high: float, delta: float | None) -> "Tensor":
    """Return -min(r A, clip(r) A); where A < 0, r is at most `delta`."""
    import torch

    within = ratio.clamp(1 - low, 1 + high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(bounded * advantages, within * advantages)


@policy_loss("grpo", over="replies")
def grpo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, clip_low: float = 0.2, clip_high: float = 0.2, delta: float | None = None,
) -> "Tensor":  # fmt: skip
    """Group relative policy optimization (Shao et al., DeepSeekMath, arXiv:2402.03300, eq. 3).

    1/G sum_i 1/|T_i| sum_t -min(r A, clip(r, 1 - low, 1 + high) A): every reply counts the same, so a token of a long
    reply counts less.
    """
    return replies.means(_clipped((new - old).exp(), advantages, clip_low, clip_high, delta))


@policy_loss("dr_grpo", over="replies", advantage="group")
def dr_grpo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, clip_low: float = 0.2, clip_high: float = 0.2, delta: float | None = None,
) -> "Tensor":  # fmt: skip
    """GRPO done right (Liu et al., arXiv:2503.20783, section 3.2): no length bias, no division by the spread.

    1/G sum_i 1/L sum_t -min(r A, clip(r) A), where L is the most tokens that a reply may have: a constant.
    """
    return replies.sums(_clipped((new - old).exp(), advantages, clip_low, clip_high, delta)) / replies.longest


@policy_loss("dapo")
def dapo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, clip_low: float = 0.2, clip_high: float = 0.28, delta: float | None = None,
) -> "Tensor":  # fmt: skip
    """Decoupled clip, token-level loss (Yu et al., DAPO, arXiv:2503.14476, eq. 8).

    1/sum_i |T_i| sum_i sum_t -min(r A, clip(r, 1 - low, 1 + high) A): every token counts the same.
    """
    return _clipped((new - old).exp(), advantages, clip_low, clip_high, delta)


@policy_loss("bnpo")
def bnpo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, clip_low: float = 0.2, clip_high: float = 0.2, delta: float | None = None,
) -> "Tensor":  # fmt: skip
    """The mean over tokens with GRPO's clip range: what TRL calls `bnpo`.

    TRL divides by the tokens of a micro-batch, so that its loss depends on the cut (issue 3021); here it is the tokens
    of the step.
    """
    return _clipped((new - old).exp(), advantages, clip_low, clip_high, delta)


@policy_loss("ppo", "reinforce_plus_plus", advantage="batch")
def ppo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, clip_low: float = 0.2, clip_high: float = 0.2, delta: float | None = None,
) -> "Tensor":  # fmt: skip
    """The clipped objective of PPO (Schulman et al., arXiv:1707.06347, eq. 7) without a critic.

    1/sum_i |T_i| sum_i sum_t -min(r A, clip(r) A), with rewards normalized over the batch: REINFORCE++ (Hu et al.,
    arXiv:2501.03262, section 3).
    """
    return _clipped((new - old).exp(), advantages, clip_low, clip_high, delta)


@policy_loss("gspo", over="replies", whole=True)
def gspo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, clip_low: float = 3e-4, clip_high: float = 4e-4, delta: float | None = None,
) -> "Tensor":  # fmt: skip
    """Group sequence policy optimization (Zheng et al., arXiv:2507.18071, eq. 5 and 7).

    1/G sum_i -min(s A, clip(s) A), where s_i = exp(1/|T_i| sum_t (new - old)) is the ratio of the whole reply. A is the
    mean advantage of its tokens.
    """
    ratio = replies.means(new - old).exp()
    return _clipped(ratio, replies.means(advantages), clip_low, clip_high, delta)


@policy_loss("cispo")
def cispo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, clip_low: float | None = None, clip_high: float = 4.0,
) -> "Tensor":  # fmt: skip
    """Clipped importance sampling weights (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5).

    1/sum_i |T_i| sum_i sum_t -stop(clip(r, 1 - low, 1 + high)) A new: a token whose ratio is clipped still teaches.
    """
    ratio = (new - old).detach().exp()
    return -ratio.clamp(None if clip_low is None else 1 - clip_low, 1 + clip_high) * advantages * new


@policy_loss("sapo", over="replies")
def sapo(
    new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies,
    *, tau_positive: float = 1.0, tau_negative: float = 1.05,
) -> "Tensor":  # fmt: skip
    """Soft adaptive policy optimization (Gao et al., arXiv:2511.20347, eq. 5 and 6).

    1/G sum_i 1/|T_i| sum_t -4/tau sigmoid(tau (r - 1)) A, where tau depends on the sign of A: a gate that closes
    smoothly takes the place of clipping.
    """
    import torch

    good = (advantages > 0).to(new.dtype)
    tau = good * tau_positive + (1 - good) * tau_negative
    gate = torch.sigmoid(tau * ((new - old).exp() - 1)) * 4 / tau
    return replies.means(-gate * advantages)


@policy_loss("reinforce", over="replies", advantage="group")
def reinforce(new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies) -> "Tensor":
    """The policy gradient (Williams, Machine Learning 8, 1992) with the mean of the group as its baseline.

    1/G sum_i sum_t -A new. On-policy its gradient is that of the expected reward, but for the factor (g - 1) / g of a
    baseline over g replies that include the reply itself; `rloo` has no such factor.
    """
    return replies.sums(-advantages * new)


@policy_loss("rloo", over="replies", advantage="leave_one_out")
def rloo(new: "Tensor", old: "Tensor", advantages: "Tensor", replies: Replies) -> "Tensor":
    """REINFORCE with the mean of the other replies as its baseline (Ahmadian et al., arXiv:2402.14740, eq. 7).

    1/G sum_i sum_t -A new: on-policy, an unbiased estimate of the gradient of the expected reward.
    """
    return replies.sums(-advantages * new)
