"""How far what speaks is from what is trained: a mean over the tokens of a step."""

from typing import TYPE_CHECKING, Any

from posttrain.runtime.launch import all_reduce

if TYPE_CHECKING:
    from posttrain.run import Run

GAP = "sampler/gap"
"""Name of the metric: mean |log p(sampler) - log p(trainer)| of the sampled tokens, in nats."""


def gap_of(run: "Run", widest: Any) -> float | None:
    """Return the mean difference between sampler and trainer in the step in hand, over all ranks, and log the largest
    ratio of their probabilities; None if a loss of your own does not log it."""
    import torch

    if GAP not in run.metrics.values:
        return None
    mine, most = (
        torch.as_tensor(x, device=run.fabric.device).float().clone() for x in (run.metrics.values[GAP], widest)
    )
    run.log(**{"sampler/max_ratio": all_reduce(run.fabric, most, "MAX").exp()})
    return float(all_reduce(run.fabric, mine)) / run.metrics.updates
