"""How far a student's next-token distribution is from its teacher's, of which only the k likeliest tokens are known.

The other tokens count as one event more, with what probability is left. So each divergence stays a divergence, a lower
bound of the one over the whole vocabulary, and is equal to it when k is the vocabulary.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "js"]


def divergence(teacher: Tensor, student: Tensor, kind: Divergence, whole: bool) -> Tensor:
    """Return the divergence at each position, in nats.

    Args:
        teacher, student: float [n, k], log-probabilities of the same tokens.
        kind: `forward` is KL(teacher || student), which covers all that the teacher does (Hinton et al.,
            arXiv:1503.02531); `reverse` is KL(student || teacher), which seeks its modes (Gu et al.,
            arXiv:2306.08543); `js` is the Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649, beta = 1/2).
        whole: whether the k tokens are the whole vocabulary.

    Returns:
        float32 [n].
    """
    p, q = (x.float() if whole else with_rest(x.float()) for x in (teacher, student))
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    mean = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, mean) + kl(q, mean)) / 2


def jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Return beta KL(p || m) + (1 - beta) KL(q || m), where m = beta p + (1 - beta) q, in nats, [n].

    Generalized Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649, eq. 1). Divided by beta it tends to
    KL(p || q) as beta goes to 0, divided by 1 - beta to KL(q || p) as it goes to 1.

    Args:
        p, q: float [n, k], log-probabilities of the same tokens.
        beta: between 0 and 1.
    """
    mean = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * kl(p, mean) + (1 - beta) * kl(q, mean)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return the sum of p log(p / q) over the last dimension, of log-probabilities; where p is 0, so is the term."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def with_rest(log_probs: Tensor) -> Tensor:
    """Return log-probabilities [n, k] with that of all other tokens as one more: [n, k + 1]."""
    known = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)  # rounding must not leave less than nothing
    return torch.cat([log_probs, (-known.expm1()).log()], dim=-1)
