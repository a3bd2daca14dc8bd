"""Callback blocks: `evaluation` acts on what was evaluated, `weights` on weights and embeddings, `speed` on time, which
counts what is computed by `operations`."""

from posttrain.blocks.callbacks.evaluation import EarlyStop, KeepBest, Samples
from posttrain.blocks.callbacks.speed import MFU, Profiler
from posttrain.blocks.callbacks.weights import EMA, NEFTune

__all__ = ["EMA", "EarlyStop", "KeepBest", "MFU", "NEFTune", "Profiler", "Samples"]
