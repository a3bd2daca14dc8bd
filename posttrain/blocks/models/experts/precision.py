"""Experts that transformers computes with one product for all, in the precision of autocast, which does not know it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from posttrain.blocks.models.documents.kernels import low_precision

GROUPED, BATCHED = "grouped_mm", "batched_mm"
"""What transformers calls one product for all experts, and one for each token, which torch has for float64, too."""
NAME = "posttrain"
PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")
"""Beginnings of the names of what experts are multiplied with, and of what is added then."""


class _Cast:
    """Experts whose weights are in another precision, for as long as they are looked at."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._experts, name)
        product = isinstance(found, Tensor) and found.dtype == torch.float32 and name.startswith(PRODUCTS)
        return found.to(self._dtype) if product else found


def grouped_experts(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts as transformers does with one product for all, in the precision of autocast.

    The product itself would be in the float32 of the weights.

    Args:
        experts: a module of transformers.
        hidden: [tokens, size].
        top_k_index, top_k_weights: [tokens, k], the experts of each token, and what they count.
    """
    compute, dtype = ALL_EXPERTS_FUNCTIONS[BATCHED if hidden.dtype == torch.float64 else GROUPED], hidden.device.type
    if not torch.is_autocast_enabled(dtype) or (low := low_precision(hidden)) is None:
        return compute(experts, hidden, top_k_index, top_k_weights)  # type: ignore[no-any-return]
    found: Tensor = compute(_Cast(experts, low), hidden.to(low), top_k_index, top_k_weights)
    return found.to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_experts)


def use_grouped_experts(hf: Any) -> None:
    """Let a model of transformers that computes its experts with one product do so in the right precision."""
    if hf.config.get_text_config()._experts_implementation == GROUPED:
        hf.set_experts_implementation(NAME)
