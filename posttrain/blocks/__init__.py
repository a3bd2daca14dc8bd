"""The blocks that ship with posttrain. Importing this package registers them; it imports nothing heavy.

`layout` makes a batch of rows; the rooms are in the order in which a run passes them: `data`, `tokenizers`, `models`,
`losses`, `parallel`, then `optimizer` and `optimizers`, `scheduler` and `callbacks`, `checkpoints`, `loggers`.
"""

from posttrain.blocks import callbacks, optimizer, scheduler
from posttrain.blocks.checkpoints import checkpoint
from posttrain.blocks.data import data
from posttrain.blocks.loggers import logger
from posttrain.blocks.models import model
from posttrain.blocks.models.speculator import model as speculator
from posttrain.blocks.models.swiftkv import model as swiftkv
from posttrain.blocks.optimizers import blocks as optimizers
from posttrain.blocks.parallel import sequence, strategy
from posttrain.blocks.tokenizers import tokenizer

__all__ = [
    "callbacks", "checkpoint", "data", "logger", "model", "optimizer", "optimizers", "scheduler", "sequence",
    "speculator", "strategy", "swiftkv", "tokenizer",
]  # fmt: skip
