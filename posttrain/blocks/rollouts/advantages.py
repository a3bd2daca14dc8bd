"""How much better than expected each reply is: its reward against those of its group, or of the whole step."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.blocks.losses.surrogate import Advantage
from posttrain.blocks.rollouts.replies import Group
from posttrain.blocks.rollouts.rewards import first_failure
from posttrain.errors import TrainingError
from posttrain.runtime.launch import all_reduce

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SMALL = 1e-4
"""Added to a spread that is divided by, as in TRL."""


def advantages(rewards: Tensor, kind: Advantage, fabric: "Fabric") -> Tensor:
    """Return the advantage of each reply. Replies whose reward failed have none (0) and do not count in any mean.

    Args:
        rewards: float64 [groups, replies], NaN where a reward failed.
        kind: group: less the mean of its group (Liu et al., arXiv:2503.20783).
            group_std: also divided by the standard deviation of its group (Shao et al., arXiv:2402.03300).
            batch_std: less the mean of its group, divided by the standard deviation of all rewards of the step
            (REINFORCE++-baseline, arXiv:2501.03262; Lite PPO, arXiv:2508.08221).
            leave_one_out: less the mean of the other replies of its group (Ahmadian et al., arXiv:2402.14740).
            batch: less the mean of all rewards of the step, divided by their standard deviation (REINFORCE++).
        fabric: of the run; means over the step are over all ranks.

    Returns:
        float64 [groups, replies].
    """
    known = ~rewards.isnan()
    given, counts = rewards.nan_to_num(0), known.sum(1, keepdim=True)
    mean, spread = over_step(given[known], fabric) if kind in ("batch", "batch_std") else (0.0, 1.0)
    if kind == "batch":
        return torch.where(known, (given - mean) / (spread + SMALL), 0.0)
    low, high = (rewards.nan_to_num(bound) for bound in (torch.inf, -torch.inf))
    varied = low.amin(1, keepdim=True) < high.amax(1, keepdim=True)  # else rounding would be a signal
    centred = torch.where(known & varied, given - given.sum(1, keepdim=True) / counts.clamp(min=1), 0.0)
    others = (counts - 1).clamp(min=1)
    if kind == "leave_one_out":
        return centred * counts / others
    if kind == "group_std":
        return centred / ((centred.square().sum(1, keepdim=True) / others).sqrt() + SMALL)
    return centred / (spread + SMALL) if kind == "batch_std" else centred


def over_step(rewards: Tensor, fabric: "Fabric") -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation (with n - 1) of all rewards of a step, over all ranks."""
    sums = torch.stack([rewards.new_tensor(len(rewards)), rewards.sum()]).to(fabric.device)
    count, total = all_reduce(fabric, sums).cpu()
    mean = total / count.clamp(min=1)
    squares = all_reduce(fabric, (rewards - mean).square().sum().to(fabric.device)).cpu()
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def compare(groups: list[Group], kind: Advantage, fabric: "Fabric") -> None:
    """Give the replies of all groups of a step their advantages.

    Raises:
        TrainingError: every reward of the step failed, on every rank.
    """
    rewards = [one for group in groups for one in group.rewards]
    known = torch.tensor(float(sum(one is not None for one in rewards)), device=fabric.device)
    if not all_reduce(fabric, known):
        raise TrainingError(f"no reply has a reward, so that there is nothing to learn from: {first_failure(groups)}")
    numbers = [[torch.nan if one is None else one for one in group.rewards] for group in groups]
    found = advantages(torch.tensor(numbers, dtype=torch.float64), kind, fabric)
    for group, values in zip(groups, found.tolist(), strict=True):
        group.advantages = values
