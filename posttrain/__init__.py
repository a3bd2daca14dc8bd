"""Post-training for language models: one loop, replaceable blocks.

Names are imported when they are first used, so that `import posttrain` and the validation of a recipe cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.batch import Batch, Extra, Term
    from posttrain.blocks.callbacks import EMA, MFU, EarlyStop, KeepBest, NEFTune, Profiler, Samples
    from posttrain.blocks.checkpoints.checkpoint import HuggingFace, Resume
    from posttrain.blocks.data.kinds.causal import CausalData
    from posttrain.blocks.data.kinds.preference import PreferenceData
    from posttrain.blocks.data.kinds.sft import SFTData
    from posttrain.blocks.data.kinds.unpaired import UnpairedData
    from posttrain.blocks.data.sources import Source
    from posttrain.blocks.joined import JoinedOptimizer
    from posttrain.blocks.loggers.logger import JSONL, Console, TensorBoard
    from posttrain.blocks.loggers.services import CSV, MLflow, Trackio, WandB
    from posttrain.blocks.losses.objective import preference_loss
    from posttrain.blocks.losses.surrogate import policy_loss
    from posttrain.blocks.models.lora import LoRA
    from posttrain.blocks.models.model import HFModel, RewardModel
    from posttrain.blocks.models.quantized.aware import QAT
    from posttrain.blocks.models.quantized.fp8 import FP8
    from posttrain.blocks.models.speculator.model import SpeculatorModel
    from posttrain.blocks.models.swiftkv.model import SwiftKVModel
    from posttrain.blocks.optimizer import AdamW, ParameterGroup
    from posttrain.blocks.optimizers.blocks import (
        SGD,
        Adafactor,
        AdamW8bit,
        AdamWBF16,
        Lion,
        Muon,
        ScheduleFree,
        TorchOptimizer,
    )  # fmt: skip
    from posttrain.blocks.parallel.sequence import Ulysses
    from posttrain.blocks.parallel.strategy import DDP, FSDP, Auto, DeepSpeed
    from posttrain.blocks.rollouts.agents.agent import Agent, agent
    from posttrain.blocks.rollouts.agents.verifiers import VerifiersEnvironment
    from posttrain.blocks.rollouts.engines.vllm import VllmSampler, VllmServerSampler
    from posttrain.blocks.rollouts.prompts import PromptData
    from posttrain.blocks.rollouts.rewards import ModelReward, reward
    from posttrain.blocks.rollouts.sampler import TransformersSampler
    from posttrain.blocks.scheduler import WSD, Constant, Cosine, Linear, TwoStage
    from posttrain.blocks.tokenizers.tokenizer import HFTokenizer
    from posttrain.errors import (
        CheckpointError,
        DataError,
        HookError,
        PosttrainError,
        RecipeError,
        RegistryError,
        SynthError,
        TrainingError,
    )  # fmt: skip
    from posttrain.hooks import after, before
    from posttrain.recipes.load import load
    from posttrain.registry import block, default, key, kind
    from posttrain.run import Run
    from posttrain.synth.clients.cortex import CortexSynth
    from posttrain.synth.clients.openai import AzureOpenAISynth, OpenAISynth
    from posttrain.synth.clients.transformers import TransformersSynth
    from posttrain.synth.clients.vllm import VllmSynth
    from posttrain.trainer import Trainer
    from posttrain.trainers.distill import DistillTrainer
    from posttrain.trainers.dpo import DPOTrainer
    from posttrain.trainers.grpo import GRPOTrainer
    from posttrain.trainers.kto import KTOTrainer
    from posttrain.trainers.mlp_speculator import SpeculatorTrainer
    from posttrain.trainers.on_policy_distill import OnPolicyDistillTrainer
    from posttrain.trainers.online_dpo import OnlineDPOTrainer
    from posttrain.trainers.reward import RewardTrainer
    from posttrain.trainers.sft import CausalTrainer, SFTTrainer
    from posttrain.trainers.swiftkv import SwiftKVTrainer
    from posttrain.values import Secret

_HOMES = {
    "batch": ("Batch", "Extra", "Term"),
    "blocks.callbacks": ("EMA", "EarlyStop", "KeepBest", "MFU", "NEFTune", "Profiler", "Samples"),
    "blocks.joined": ("JoinedOptimizer",),
    "blocks.checkpoints.checkpoint": ("HuggingFace", "Resume"),
    "blocks.data.kinds.causal": ("CausalData",),
    "blocks.data.kinds.preference": ("PreferenceData",),
    "blocks.data.kinds.sft": ("SFTData",),
    "blocks.loggers.logger": ("Console", "JSONL", "TensorBoard"),
    "blocks.loggers.services": ("CSV", "MLflow", "Trackio", "WandB"),
    "blocks.rollouts.engines.vllm": ("VllmSampler", "VllmServerSampler"),
    "blocks.rollouts.agents.agent": ("Agent", "agent"),
    "blocks.rollouts.agents.verifiers": ("VerifiersEnvironment",),
    "blocks.rollouts.prompts": ("PromptData",),
    "blocks.models.lora": ("LoRA",),
    "blocks.models.model": ("HFModel", "RewardModel"),
    "blocks.models.quantized.aware": ("QAT",),
    "blocks.models.quantized.fp8": ("FP8",),
    "blocks.optimizer": ("AdamW", "ParameterGroup"),
    "blocks.optimizers.blocks": (
        "SGD", "AdamW8bit", "AdamWBF16", "Adafactor", "Lion", "Muon", "ScheduleFree", "TorchOptimizer",
    ),
    "blocks.losses.objective": ("preference_loss",),
    "blocks.losses.surrogate": ("policy_loss",),
    "blocks.rollouts.rewards": ("ModelReward", "reward"),
    "blocks.rollouts.sampler": ("TransformersSampler",),
    "blocks.scheduler": ("Constant", "Cosine", "Linear", "TwoStage", "WSD"),
    "blocks.parallel.sequence": ("Ulysses",),
    "blocks.data.sources": ("Source",),
    "blocks.data.kinds.unpaired": ("UnpairedData",),
    "blocks.models.speculator.model": ("SpeculatorModel",),
    "blocks.parallel.strategy": ("Auto", "DDP", "DeepSpeed", "FSDP"),
    "blocks.models.swiftkv.model": ("SwiftKVModel",),
    "blocks.tokenizers.tokenizer": ("HFTokenizer",),
    "errors": (
        "CheckpointError", "DataError", "HookError", "PosttrainError", "RecipeError", "RegistryError", "SynthError",
        "TrainingError",
    ),
    "hooks": ("after", "before"),
    "recipes.load": ("load",),
    "registry": ("block", "default", "key", "kind"),
    "run": ("Run",),
    "synth.clients.cortex": ("CortexSynth",),
    "synth.clients.openai": ("AzureOpenAISynth", "OpenAISynth"),
    "synth.clients.transformers": ("TransformersSynth",),
    "synth.clients.vllm": ("VllmSynth",),
    "trainer": ("Trainer",),
    "trainers.distill": ("DistillTrainer",),
    "trainers.dpo": ("DPOTrainer",),
    "trainers.grpo": ("GRPOTrainer",),
    "trainers.kto": ("KTOTrainer",),
    "trainers.mlp_speculator": ("SpeculatorTrainer",),
    "trainers.on_policy_distill": ("OnPolicyDistillTrainer",),
    "trainers.online_dpo": ("OnlineDPOTrainer",),
    "trainers.reward": ("RewardTrainer",),
    "trainers.sft": ("CausalTrainer", "SFTTrainer"),
    "trainers.swiftkv": ("SwiftKVTrainer",),
    "values": ("Secret",),
}  # fmt: skip
"""Module -> the public names in it."""
_HOME_OF = {name: f"posttrain.{module}" for module, found in _HOMES.items() for name in found}

__all__ = [
    "Adafactor", "AdamW", "AdamW8bit", "AdamWBF16", "Agent", "Auto", "AzureOpenAISynth", "Batch", "CSV", "CausalData",
    "CausalTrainer", "CheckpointError", "Console", "Constant", "CortexSynth", "Cosine", "DDP", "DPOTrainer",
    "DataError", "DeepSpeed", "DistillTrainer", "EMA", "EarlyStop", "Extra", "FP8", "FSDP", "GRPOTrainer", "HFModel",
    "HFTokenizer", "HookError", "HuggingFace", "JSONL", "JoinedOptimizer", "KTOTrainer", "KeepBest", "Linear", "Lion",
    "LoRA", "MFU", "MLflow", "ModelReward", "Muon", "NEFTune", "OnPolicyDistillTrainer", "OnlineDPOTrainer",
    "OpenAISynth", "ParameterGroup", "PosttrainError", "PreferenceData", "Profiler", "PromptData", "QAT", "RecipeError",
    "RegistryError", "Resume", "RewardModel", "RewardTrainer", "Run", "SFTData", "SFTTrainer", "SGD", "Samples",
    "ScheduleFree", "Secret", "Source", "SpeculatorModel", "SpeculatorTrainer", "SwiftKVModel", "SwiftKVTrainer",
    "SynthError", "TensorBoard", "Term", "TorchOptimizer", "Trackio", "Trainer", "TrainingError", "TransformersSampler",
    "TransformersSynth", "TwoStage", "Ulysses", "UnpairedData", "VerifiersEnvironment", "VllmSampler",
    "VllmServerSampler", "VllmSynth", "WSD", "WandB", "after", "agent", "before", "block", "default", "key", "kind",
    "load", "policy_loss", "preference_loss", "reward",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
