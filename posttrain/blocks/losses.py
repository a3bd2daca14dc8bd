"""Cross-entropy of a linear head, in chunks, so that [tokens, vocabulary] is never held at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25
"""Logits computed at a time: 128 MiB in float32."""


def nll_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of the targets under a linear head.

    The gradients are made in the forward pass, chunk by chunk, while the chunk's logits are at hand:
    nothing is computed twice, and the peak is one chunk. The sum is in float32 whatever the precision.

    Args:
        hidden: [n, size].
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        targets: int64 [n].

    Returns:
        A float32 scalar, in nats; 0 if n is 0.
    """
    return _NLLSum.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return, no-untyped-call]


def target_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the log-probability of each target; the backward pass computes each chunk's logits again.

    Args:
        hidden: [n, size].
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        targets: int64 [n].

    Returns:
        float32 [n], in nats.
    """
    chunk = chunk_rows(weight)
    parts = [
        checkpoint(_log_probs, hidden[i : i + chunk], weight, bias, targets[i : i + chunk], use_reentrant=False)
        for i in range(0, len(targets), chunk)
    ]
    return torch.cat(parts) if parts else hidden.sum(-1).float()


def chunk_rows(weight: Tensor) -> int:
    """Return how many rows of logits make up a chunk."""
    return max(64, CHUNK_ELEMENTS // weight.shape[0])


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")


class _NLLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wanted = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        grads = [
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted[1] else None,
            torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if wanted[2] else None,
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = chunk_rows(weight)
        with torch.autocast(device, enabled=False):
            for i in range(0, len(targets), chunk):
                rows, goals = hidden[i : i + chunk].to(dtype), targets[i : i + chunk, None]
                logits = F.linear(rows, head, offset).float()
                norm = logits.logsumexp(-1, keepdim=True)
                total += (norm - logits.gather(1, goals)).sum()
                if not any(wanted):
                    continue
                probs = logits.sub_(norm).exp_()
                probs.scatter_add_(1, goals, torch.full_like(goals, -1, dtype=probs.dtype))
                if grads[2] is not None:
                    grads[2] += probs.sum(0)
                slopes = probs.to(dtype)
                if grads[0] is not None:
                    grads[0][i : i + chunk] = slopes @ head
                if grads[1] is not None and dtype == torch.float32:
                    grads[1].addmm_(slopes.t(), rows)
                elif grads[1] is not None:
                    grads[1] += slopes.t() @ rows
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * scale).to(dtype) for g, dtype in pairs), None
