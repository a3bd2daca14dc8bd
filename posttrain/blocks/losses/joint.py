"""Losses of pairs that depend on other pairs of the same step, whatever micro-batches and ranks they are cut into.

A loss over all pairs is differentiated once by their log-probabilities, which are few numbers; each micro-batch then
carries its pairs' losses and slopes, and passes the slopes on to the parameters (as in Gao et al., arXiv:2101.06983).
The price is a forward pass without gradients over the step.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.batch import Batch
from posttrain.runtime.launch import all_reduce, gather_rows

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from posttrain.blocks.losses.objective import Objective


def with_mean_lengths(batches: Iterable[Batch], fabric: "Fabric") -> Iterator[Batch]:
    """Yield the batches with `mean_lengths`, [2]: over the chosen and the rejected replies of all of them."""
    sums = torch.zeros(3, device=fabric.device)
    for batch in counting(batches):
        sums[:2] += batch["lengths"].sum(0)
        sums[2] += len(batch["lengths"])
    all_reduce(fabric, sums)
    for batch in batches:
        yield batch | {"mean_lengths": sums[:2] / sums[2]}


def with_joint_losses(
    batches: Iterable[Batch],
    log_probs: Callable[[Batch], tuple[Tensor, Tensor]],
    objective: "Objective",
    fabric: "Fabric",
) -> Iterator[Batch]:
    """Yield the batches with what an objective over all their pairs makes of each.

    Args:
        batches: of pairs.
        log_probs: gives the log-probabilities of policy and reference, [pairs, 2] each.
        objective: depends on all pairs.
        fabric: of the run.

    Yields:
        Each batch with `joint`: the losses of its pairs [pairs], and their slopes by the policy's [pairs, 2].
    """
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):  # the passes that follow draw the same dropout
        said = [(batch, torch.stack([*log_probs(batch), batch["lengths"]])) for batch in batches]
    found = [numbers for batch, numbers in said if batch.weight]  # where weights are sharded, all ranks ask alike
    mine = torch.cat(found, dim=1) if found else torch.zeros(3, 0, 2, device=fabric.device)
    ranks = gather_rows(fabric, mine.transpose(0, 1))
    policy, reference, lengths = torch.cat(ranks).unbind(1)
    with torch.enable_grad():
        policy = policy.requires_grad_()
        losses = objective(policy, reference, lengths)
        (slopes,) = torch.autograd.grad(losses.sum(), policy)
    at = sum(len(rows) for rows in ranks[: fabric.global_rank])
    for batch in batches:
        pairs = len(batch["lengths"])  # also of a batch that counts nothing
        part = slice(at, at + pairs) if batch.weight else slice(0, pairs)
        at += pairs if batch.weight else 0
        yield batch | {"joint": (losses.detach()[part], slopes[part])}


def counting(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches that count: not those of a rank that has run out of rows."""
    return (batch for batch in batches if batch.weight)


def through(policy: Tensor, losses: Tensor, slopes: Tensor) -> Tensor:
    """Return losses [pairs] whose gradients by the log-probabilities [pairs, 2] are the given slopes."""
    return losses + ((policy - policy.detach()) * slopes).sum(-1)
