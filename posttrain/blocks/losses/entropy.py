"""Log-probabilities of sampled tokens, and the entropy of what they were sampled from, of one linear head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.blocks.losses.cross_entropy import add_product, chunk_rows, compute_dtype


def log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of one token at each position, and the entropy of all, in nats.

    In chunks, so that [n, vocabulary] is never held at once; the backward pass computes the logits again.

    Args:
        hidden: [n, size].
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        targets: int64 [n].
        temperature: what logits are divided by.

    Returns:
        float32 [n] each.
    """
    return _Policy.apply(hidden, weight, bias, targets, temperature)  # type: ignore[no-any-return, no-untyped-call]


def of_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the same of logits [n, vocabulary] that are all there."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        chosen, entropy = (torch.empty(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(2))
        norms, chunk = torch.empty(len(targets), 1, dtype=torch.float32, device=hidden.device), chunk_rows(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, len(targets), chunk):
                part = slice(i, i + chunk)
                logits = F.linear(hidden[part].to(dtype), head, offset).float().div_(temperature)
                norms[part] = logits.logsumexp(-1, keepdim=True)
                log_probs = logits.sub_(norms[part])
                chosen[part] = log_probs.gather(1, targets[part, None])[:, 0]
                entropy[part] = -(log_probs.exp().mul_(log_probs)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, norms, entropy)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.temperature = dtype, temperature
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norms, entropy = ctx.saved_tensors
        by_chosen, by_entropy = (None if one is None else one[:, None] / ctx.temperature for one in upstream)
        dtype, wanted = ctx.dtype, ctx.needs_input_grad
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        grads = [
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted[1] else None,
            torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if wanted[2] else None,
        ]
        chunk = chunk_rows(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, len(targets), chunk):
                part = slice(i, i + chunk)
                rows = hidden[part].to(dtype)
                log_probs = F.linear(rows, head, offset).float().div_(ctx.temperature).sub_(norms[part])
                probs = log_probs.exp()
                # d log p(target) = [target] - p;  d entropy = -p (log p + entropy)
                slopes = torch.zeros_like(probs)
                if by_chosen is not None:
                    slopes -= probs * by_chosen[part]
                    slopes.scatter_add_(1, targets[part, None], by_chosen[part])
                if by_entropy is not None:
                    slopes -= probs.mul_(log_probs.add_(entropy[part, None])).mul_(by_entropy[part])
                if grads[2] is not None:
                    grads[2] += slopes.sum(0)
                slopes = slopes.to(dtype)
                if grads[0] is not None:
                    grads[0][part] = slopes @ head
                if grads[1] is not None:
                    add_product(grads[1], slopes, rows)
        cast = (None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden, weight, bias), strict=True))
        return *cast, None, None
