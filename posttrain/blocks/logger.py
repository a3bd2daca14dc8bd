"""Where metrics go: the terminal, TensorBoard, a JSONL file."""

from typing import TYPE_CHECKING

from posttrain.registry import block

if TYPE_CHECKING:
    from lightning.fabric.loggers.logger import Logger

    from posttrain.run import Run


@block("logger", "console")
class Console:
    """A live progress line on a terminal, plain lines elsewhere, and a summary at the end."""

    def build(self, run: "Run") -> "Logger":
        """Return the logger."""
        raise NotImplementedError


@block("logger", "tensorboard")
class TensorBoard:
    """Event files in the run's folder, for `tensorboard --logdir`."""

    def build(self, run: "Run") -> "Logger":
        """Return Lightning's TensorBoard logger."""
        raise NotImplementedError


@block("logger", "jsonl")
class JSONL:
    """`metrics.jsonl` in the run's folder: one line per optimizer step."""

    def build(self, run: "Run") -> "Logger":
        """Return the logger."""
        raise NotImplementedError
