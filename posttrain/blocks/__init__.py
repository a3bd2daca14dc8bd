"""The blocks that ship with posttrain. Importing this package registers them; it imports nothing heavy."""

from posttrain.blocks import (
    callbacks,
    checkpoint,
    data,
    logger,
    model,
    optimizer,
    scheduler,
    sequence,
    speculator,
    strategy,
    swiftkv,
    tokenizer,
)  # fmt: skip

__all__ = [
    "callbacks", "checkpoint", "data", "logger", "model", "optimizer", "scheduler", "sequence", "speculator",
    "strategy", "swiftkv", "tokenizer",
]  # fmt: skip
