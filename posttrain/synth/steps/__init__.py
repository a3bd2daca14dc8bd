"""The steps that ship with posttrain. Importing this registers them, and imports nothing heavy."""

from posttrain.synth.steps import compare, decontaminate, dedup, generate, judge, pair, reward, rows, verify

__all__ = ["compare", "decontaminate", "dedup", "generate", "judge", "pair", "reward", "rows", "verify"]
