"""The steps that ship with posttrain. Importing this registers them, and imports nothing heavy."""

from posttrain.synth.steps import compare, complete, generate, judge, pair, reward, rows, sample, verify
from posttrain.synth.steps.alike import decontaminate, dedup, semantic
from posttrain.synth.steps.turns import converse, search

__all__ = [
    "compare", "complete", "converse", "decontaminate", "dedup", "generate", "judge", "pair", "reward", "rows",
    "sample", "search", "semantic", "verify",
]  # fmt: skip
