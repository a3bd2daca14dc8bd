"""Model blocks."""

from typing import TYPE_CHECKING, Any

import attrs

from posttrain.registry import block

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn


@block("model", "hf")
class HFModel:
    """A causal language model of transformers."""

    name_or_path: str
    """A folder or a hub name."""
    dtype: str = "float32"
    """Of the weights in memory."""
    attn_implementation: str = "auto"

    def build(self, fabric: "Fabric") -> "nn.Module":
        """Load it."""
        raise NotImplementedError
