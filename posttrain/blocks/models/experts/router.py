"""The losses of routers: one balances the experts of a mixture, the other keeps the routers' logits small.

The first (Fedus et al., arXiv:2101.03961, eq. 4 to 6) is taken document by document.

A product of two means over tokens is no mean over tokens: taken over a micro-batch, it would depend on how a step is
cut. Taken over each document it is what transformers computes for a document alone, and its mean over all tokens of a
step is the same under every cut, packing and number of ranks. Padding takes no part.
"""

from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Layout, Term
from posttrain.errors import RecipeError


def router_weight(hf: Any, asked: float | None) -> float:
    """Return how much the loss of a model's routers counts: as asked, or as its configuration says.

    Raises:
        RecipeError: it is asked for, but the model has no routers that give their logits.
    """
    config, routed = hf.config.get_text_config(), has_routers(hf)
    if asked and not routed:
        raise RecipeError(f"model.router_aux_loss: {type(hf).__name__} has no routers whose logits it gives")
    if asked is not None or not routed:
        return asked or 0.0
    said = config.to_dict()
    return float(said.get("router_aux_loss_coef") or 0.0) if said.get("output_router_logits") else 0.0


def z_weight(hf: Any, asked: float) -> float:
    """Return how much the z-loss of a model's routers counts.

    Raises:
        RecipeError: it is asked for, but the model has no routers that give their logits.
    """
    if asked and not has_routers(hf):
        raise RecipeError(f"model.router_z_loss: {type(hf).__name__} has no routers whose logits it gives")
    return asked


def has_routers(hf: Any) -> bool:
    """Whether a model says in which modules it routes."""
    return any("router_logits" in (getattr(part, "_can_record_outputs", None) or {}) for part in hf.modules())


def balance(logits: tuple[Tensor, ...], layout: Layout, top_k: int, weight: float) -> Term:
    """Return the balancing loss of the routers as a term, whose count is tokens.

    Args:
        logits: [rows * width, experts] of each layer.
        layout: of the documents.
        top_k: experts of a token.
        weight: of the term.
    """
    experts = logits[0].shape[-1]
    of, tokens, real = documents_of(layout, logits[0])
    documents = len(tokens)
    chosen, probability = (torch.zeros(documents, experts, device=of.device) for _ in range(2))
    for layer in logits:
        probabilities = layer.float().softmax(-1)
        picked = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, -1).indices, 1.0)
        chosen = chosen.index_add(0, of, picked)
        probability = probability.index_add(0, of, probabilities)
    shares = (chosen * probability).sum(-1) / (len(logits) * tokens).clamp(min=1) ** 2  # [documents]
    return Term(experts * (real * tokens * shares).sum(), "tokens", weight)


def small(logits: tuple[Tensor, ...], layout: Layout, weight: float) -> Term:
    """Return the z-loss of the routers (Zoph et al., arXiv:2202.08906, eq. 5) as a term, whose count is tokens.

    It is the square of the log of the sum of the exponentials of a token's logits, a mean over layers.

    Args:
        logits: [rows * width, experts] of each layer.
        layout: of the documents.
        weight: of the term.
    """
    of, _, real = documents_of(layout, logits[0])
    total = torch.stack([layer.float().logsumexp(-1).square() for layer in logits]).mean(0)  # [rows * width]
    return Term((total * real[of]).sum(), "tokens", weight)


def documents_of(layout: Layout, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the document of each token, [rows * width]; how many tokens each has, and 1 for it or 0 if it is padding,
    [documents] each.

    Args:
        layout: of the documents.
        like: [rows * width, ...], on the device that is meant.
    """
    seqlens = layout.cu_seqlens.diff().to(like.device)
    of = torch.repeat_interleave(torch.arange(len(seqlens), device=like.device), seqlens, output_size=len(like))
    real = torch.zeros(len(seqlens), device=like.device).index_fill(0, of[layout.ends], 1.0)  # padding ends nowhere
    return of, seqlens.float(), real
