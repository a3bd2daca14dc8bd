"""The blocks that ship with posttrain. Importing this package registers them; it imports nothing heavy.

`layout` makes a batch of rows; the rooms are in the order in which a run passes them: `data`, `tokenizers`, `models`,
`losses`, `parallel`, `rollouts`, `optimizer`, `optimizers`, `scheduler` and `callbacks`, `checkpoints`, `loggers`.
"""

from posttrain.blocks import callbacks, optimizer, scheduler
from posttrain.blocks.checkpoints import checkpoint
from posttrain.blocks.data.kinds import causal, preference, sft, unpaired
from posttrain.blocks.loggers import logger, services
from posttrain.blocks.models import model
from posttrain.blocks.models.speculator import model as speculator
from posttrain.blocks.models.swiftkv import model as swiftkv
from posttrain.blocks.optimizers import blocks as optimizers
from posttrain.blocks.parallel import sequence, strategy
from posttrain.blocks.rollouts import prompts, rewards, sampler
from posttrain.blocks.rollouts.agents import verifiers
from posttrain.blocks.rollouts.engines import vllm
from posttrain.blocks.tokenizers import tokenizer

__all__ = [
    "callbacks", "causal", "checkpoint", "logger", "model", "optimizer", "optimizers", "preference", "prompts",
    "rewards", "sampler", "scheduler", "sequence", "services", "sft", "speculator", "strategy", "swiftkv",
    "tokenizer", "unpaired", "verifiers", "vllm",
]  # fmt: skip
