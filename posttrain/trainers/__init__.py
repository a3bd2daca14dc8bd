"""One module per training method. Importing this package registers them; it imports nothing heavy."""

from posttrain.trainers import distill, dpo, reward, sft, swiftkv

__all__ = ["distill", "dpo", "reward", "sft", "swiftkv"]
