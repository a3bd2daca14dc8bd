"""One module per training method. Importing this package registers them; it imports nothing heavy."""

from posttrain.trainers import dpo, sft

__all__ = ["dpo", "sft"]
