"""Where metrics go: the terminal, TensorBoard, a JSONL file."""

from typing import TYPE_CHECKING

from posttrain.interfaces import Logger
from posttrain.registry import block

if TYPE_CHECKING:
    from posttrain.run import Run


@block("logger", "console")
class Console:
    """A live progress line on a terminal, plain lines elsewhere, and a summary at the end."""

    def build(self, run: "Run") -> Logger:
        """Return the logger."""
        from posttrain.blocks.loggers.console import ConsoleLogger

        return ConsoleLogger(run)


@block("logger", "tensorboard")
class TensorBoard:
    """Event files in `tensorboard` of the run's folder, for `tensorboard --logdir`."""

    def build(self, run: "Run") -> Logger:
        """Return Lightning's TensorBoard logger; what an earlier process wrote after its last checkpoint is purged."""
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(run.output_dir, name="tensorboard", version="", purge_step=run.step + 1)


@block("logger", "jsonl")
class JSONL:
    """`metrics.jsonl` in the run's folder: a line per optimizer step, with the `time` it was written (s since 1970)."""

    def build(self, run: "Run") -> Logger:
        """Return the logger; lines of steps that will be taken again are removed."""
        from posttrain.blocks.loggers.console import JSONLLogger

        return JSONLLogger(run.output_dir / "metrics.jsonl", run.step)
