"""Cross-entropy of a linear head, in chunks, so that [tokens, vocabulary] is never held at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**25
"""Logits computed at a time: 128 MiB in float32."""
PARTS = 8
"""In which something is computed that would otherwise need a copy of a chunk, or of the head."""


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
    learning = torch.is_grad_enabled()  # it is off inside of the function
    return _NLLSum.apply(hidden, weight, bias, targets, learning)  # type: ignore[no-any-return, no-untyped-call]


def token_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the log-probabilities of some tokens at each position.

    The backward pass computes the logits again, chunk by chunk, unless all of them fit into one chunk.

    Args:
        hidden: [n, size].
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        tokens: int64 [n, k], of one position all different.
        temperature: what logits are divided by.

    Returns:
        float32 [n, k], in nats.
    """
    return _LogProbs.apply(hidden, weight, bias, tokens, temperature)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def top_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the k most probable tokens of each position, the most probable first.

    Args:
        hidden: [n, size].
        weight: [vocabulary, size].
        bias: [vocabulary], or None.
        k: at most the vocabulary.
        temperature: what logits are divided by.

    Returns:
        log_probs: float32 [n, k], in nats.
        tokens: int64 [n, k].
    """
    parts = [top_of(F.linear(rows, weight, bias), k, temperature) for rows in torch.split(hidden, chunk_rows(weight))]
    log_probs, tokens = (torch.cat(column) for column in zip(*parts, strict=True))
    return log_probs, tokens


def top_of(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the k highest log-probabilities of logits [n, vocabulary], and their tokens: [n, k] each."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    found = log_probs.topk(k, dim=-1)
    return found.values, found.indices


def chunk_rows(weight: Tensor) -> int:
    """Return how many rows of logits make up a chunk."""
    return max(64, CHUNK_ELEMENTS // weight.shape[0])


def norms(logits: Tensor) -> Tensor:
    """Return the logsumexp of each row: [n, 1]. In parts, since torch makes a copy of what it is given."""
    parts = torch.split(logits, -(-len(logits) // PARTS))
    return torch.cat([part.logsumexp(-1, keepdim=True) for part in parts])


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the precision that a linear layer computes in: autocast's, or the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class _NLLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, learning: bool
    ) -> Tensor:
        wanted = [learning and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        device, dtype = hidden.device.type, compute_dtype(hidden)
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
                norm = norms(logits)
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
                if grads[1] is not None:
                    add_product(grads[1], slopes, rows)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.grads = grads  # not saved as usual: whoever gets them must be the only one who holds them
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,), grads, ctx.grads = upstream, ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of a cross-entropy are made once: it cannot go backward twice")
        pairs = zip(grads, ctx.dtypes, strict=True)  # in place: a head's gradient is as large as the head
        return *(None if g is None else g.mul_(scale).to(dtype) for g, dtype in pairs), None, None


def divergence_sum(student: Tensor, teacher: Tensor, head: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the summed KL(teacher || student) of two states under one frozen linear head, and their agreement.

    In log space, and chunk by chunk with the gradients made in the forward pass, as in `nll_sum`.

    Args:
        student: [n, size], may require gradients.
        teacher: [n, size].
        head: [vocabulary, size], frozen.
        temperature: what logits are divided by.

    Returns:
        Float32 scalars: the divergence in nats, and at how many positions the likeliest token is the same.
    """
    assert not head.requires_grad, "the head is the teacher's"
    return _DivergenceSum.apply(student, teacher, head, temperature)  # type: ignore[no-any-return, no-untyped-call]


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        dtype, device = compute_dtype(student), student.device.type
        weight, slope = head.to(dtype), torch.empty_like(student)
        total, same = (torch.zeros((), dtype=torch.float32, device=student.device) for _ in range(2))
        chunk = chunk_rows(head)
        with torch.autocast(device, enabled=False):
            for i in range(0, len(student), chunk):
                part = slice(i, i + chunk)
                ours, theirs = (F.linear(x[part].to(dtype), weight).float() / temperature for x in (student, teacher))
                same += (ours.argmax(-1) == theirs.argmax(-1)).sum()
                q, p = ours.log_softmax(-1), theirs.log_softmax(-1)
                total += (p.exp() * (p - q)).sum()
                slope[part] = ((q.exp() - p.exp()) / temperature).to(dtype) @ weight
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(same)
        return total, same

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * upstream[0]).to(slope.dtype), None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
    ) -> Tensor:
        device, dtype = hidden.device.type, compute_dtype(hidden)
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        found = torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
        tops, sums = (torch.empty(len(tokens), 1, dtype=torch.float32, device=hidden.device) for _ in range(2))
        chunk, powers = chunk_rows(weight), None
        with torch.autocast(device, enabled=False):
            for i in range(0, len(tokens), chunk):
                part = slice(i, i + chunk)
                logits = F.linear(hidden[part].to(dtype), head, offset).float().div_(temperature)
                tops[part], asked = logits.amax(-1, keepdim=True), logits.gather(1, tokens[part])
                powers = logits.sub_(tops[part]).exp_()  # in place, and once: logsumexp would use as much memory again
                sums[part] = powers.sum(-1, keepdim=True)
                found[part] = asked - tops[part] - sums[part].log()
        kept = powers if len(tokens) <= chunk and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, tokens, tops, sums, kept)
        ctx.dtype, ctx.temperature = dtype, temperature
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        hidden, weight, bias, tokens, tops, sums, kept = ctx.saved_tensors
        dtype, wanted = ctx.dtype, ctx.needs_input_grad
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        for_hidden = torch.empty_like(hidden) if wanted[0] else None
        for_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted[1] else None
        for_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if wanted[2] else None
        chunk = chunk_rows(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, len(tokens), chunk):
                part = slice(i, i + chunk)
                rows, slope = hidden[part].to(dtype), scale[part] / ctx.temperature
                powers = kept
                if powers is None:
                    powers = F.linear(rows, head, offset).float().div_(ctx.temperature).sub_(tops[part]).exp_()
                # d log p(token) = [token] - p(all), summed over the tokens asked for
                slopes = powers.mul_(-slope.sum(-1, keepdim=True) / sums[part])
                slopes.scatter_add_(1, tokens[part], slope)
                if for_bias is not None:
                    for_bias += slopes.sum(0)
                slopes = slopes.to(dtype)
                if for_hidden is not None:
                    for_hidden[part] = slopes @ head
                if for_weight is not None:
                    add_product(for_weight, slopes, rows)
        grads = (for_hidden, for_weight, for_bias)
        cast = (None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden, weight, bias), strict=True))
        return *cast, None, None


def add_product(total: Tensor, slopes: Tensor, rows: Tensor) -> None:
    """Add slopes' [vocabulary, n] x rows [n, size] to a float32 sum: in place where precision allows, or else in parts,
    since the product of all would be as large as the head."""
    if slopes.dtype == torch.float32:
        total.addmm_(slopes.t(), rows)
        return
    width = -(-len(total) // PARTS)
    for sums, part in zip(torch.split(total, width), torch.split(slopes, width, dim=1), strict=True):
        sums += part.t() @ rows
