"""Data blocks."""

from pathlib import Path
from typing import Any

from posttrain.interfaces import Loaders
from posttrain.registry import block


@block("data", "sft")
class SFTData:
    """Conversations."""

    sources: list[Path]

    def build(self, tokenizer: Any, micro_batch_size: int, rank: int, world_size: int, seed: int) -> Loaders:
        """Make the loaders."""
        raise NotImplementedError
