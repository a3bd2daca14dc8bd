"""Checkpoint blocks: one to go on from, one to use elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING

from attrs.validators import gt, optional

from posttrain.registry import block, key

if TYPE_CHECKING:
    from posttrain.run import Run


@block("checkpoint", "resume")
class Resume:
    """Everything needed to go on training as if nothing had happened."""

    every: int | None = key(500, also=("save_every_n_steps",), check=optional(gt(0)))
    """Optimizer steps between checkpoints; null for none."""
    every_epochs: int | None = key(None, also=("save_every_n_epochs",), check=optional(gt(0)))
    """Passes over the data between checkpoints."""
    at_end: bool = key(True, also=("save_end_of_training",))
    """Save when the run ends, also when a signal or `stop_after` ends it early."""
    keep: int = key(2, check=gt(0))
    """How many of the newest checkpoints stay on disk."""

    def load(self, run: "Run") -> None:
        """Go on from the newest whole checkpoint."""

    def save(self, run: "Run", at_end: bool) -> None:
        """Save if it is time to."""


@block("checkpoint", "huggingface")
class HuggingFace:
    """The model and the tokenizer, as transformers and vLLM load them."""

    output_dir: Path | None = None
    """Defaults to `huggingface` inside the run's folder."""
    every: int | None = key(None, also=("save_every_n_steps",), check=optional(gt(0)))
    """Optimizer steps between exports, each into a folder `step-N` of its own; null for none."""
    every_epochs: int | None = key(None, also=("save_every_n_epochs",), check=optional(gt(0)))
    """Passes over the data between exports."""
    at_end: bool = key(True, also=("save_end_of_training",))
    """Export the finished model."""

    def load(self, run: "Run") -> None:
        """Nothing: an exported model is a starting point, named by `model.name_or_path`."""

    def save(self, run: "Run", at_end: bool) -> None:
        """Export if it is time to."""
