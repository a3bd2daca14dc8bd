"""Losses of single replies that people found good or bad, as pure functions."""

from torch import Tensor


def kto(
    gain: Tensor, estimate: Tensor, good: Tensor, beta: float, good_weight: float = 1.0, bad_weight: float = 1.0
) -> Tensor:
    """Return the loss of each reply, [n]: Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306, eq. 7).

    With z the estimated divergence of the policy from the reference, at least 0: good_weight (1 - sigmoid(beta (gain -
    z))) for a good reply, bad_weight (1 - sigmoid(beta (z - gain))) for a bad one.

    Args:
        gain: [n], the summed log-probability of each reply less that under the reference, in nats.
        estimate: a scalar, the mean gain of replies to other prompts: an estimate of the divergence. It gives no
            gradient.
        good: bool [n].
        beta: how strongly gains count.
        good_weight, bad_weight: of both kinds, such as to make up for their numbers.
    """
    above = beta * (gain - estimate.detach().clamp(min=0))
    return good * good_weight * (-above).sigmoid() + ~good * bad_weight * above.sigmoid()
