"""Post-training for language models: one loop, replaceable blocks.

Every public name can be imported from here. Each is looked up when it is first used, so that
`import posttrain` costs nothing and `posttrain --help` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.blocks.checkpoint import HuggingFace as HuggingFace
    from posttrain.blocks.checkpoint import Resume as Resume
    from posttrain.blocks.data import SFTData as SFTData
    from posttrain.blocks.logger import JSONL as JSONL
    from posttrain.blocks.logger import Console as Console
    from posttrain.blocks.logger import TensorBoard as TensorBoard
    from posttrain.blocks.model import HFModel as HFModel
    from posttrain.blocks.optimizer import AdamW as AdamW
    from posttrain.blocks.scheduler import WSD as WSD
    from posttrain.blocks.scheduler import Constant as Constant
    from posttrain.blocks.scheduler import Cosine as Cosine
    from posttrain.blocks.scheduler import Linear as Linear
    from posttrain.blocks.strategy import DDP as DDP
    from posttrain.blocks.strategy import Auto as Auto
    from posttrain.blocks.strategy import DeepSpeed as DeepSpeed
    from posttrain.blocks.tokenizer import HFTokenizer as HFTokenizer
    from posttrain.errors import CheckpointError as CheckpointError
    from posttrain.errors import DataError as DataError
    from posttrain.errors import HookError as HookError
    from posttrain.errors import PosttrainError as PosttrainError
    from posttrain.errors import RecipeError as RecipeError
    from posttrain.errors import RegistryError as RegistryError
    from posttrain.errors import TrainingError as TrainingError
    from posttrain.hooks import after as after
    from posttrain.hooks import before as before
    from posttrain.recipe import load as load
    from posttrain.registry import block as block
    from posttrain.registry import default as default
    from posttrain.registry import key as key
    from posttrain.run import Run as Run
    from posttrain.trainer import Trainer as Trainer
    from posttrain.trainers.sft import SFTTrainer as SFTTrainer
    from posttrain.values import Secret as Secret

_MODULES = {
    "blocks.checkpoint": ("HuggingFace", "Resume"),
    "blocks.data": ("SFTData",),
    "blocks.logger": ("Console", "JSONL", "TensorBoard"),
    "blocks.model": ("HFModel",),
    "blocks.optimizer": ("AdamW",),
    "blocks.scheduler": ("WSD", "Constant", "Cosine", "Linear"),
    "blocks.strategy": ("Auto", "DDP", "DeepSpeed"),
    "blocks.tokenizer": ("HFTokenizer",),
    "errors": (
        "CheckpointError", "DataError", "HookError", "PosttrainError", "RecipeError", "RegistryError", "TrainingError",
    ),
    "hooks": ("after", "before"),
    "recipe": ("load",),
    "registry": ("block", "default", "key"),
    "run": ("Run",),
    "trainer": ("Trainer",),
    "trainers.sft": ("SFTTrainer",),
    "values": ("Secret",),
}  # fmt: skip
"""Module -> the public names in it; a new one needs a line here and one above."""

_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"posttrain.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
