"""What preference pairs are worth: the losses of DPO and its relatives, as pure functions.

Each takes, for every pair, the log-probabilities of both replies and gives the loss of each pair; their mean is what
the paper minimizes. To add a loss, write a function:

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

import math
from typing import TYPE_CHECKING

from posttrain.blocks.losses.objective import log_sigmoid, preference_loss

if TYPE_CHECKING:
    from torch import Tensor


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
