"""One module per training method. Importing this package registers them; it imports nothing heavy.

`sft` is the shortest: a loss, and nothing else. `dpo`, `reward` and `distill` train from preferences and teachers,
`swiftkv` and `mlp_speculator` make models cheaper to serve.
"""

from posttrain.trainers import distill, dpo, mlp_speculator, reward, sft, swiftkv

__all__ = ["distill", "dpo", "mlp_speculator", "reward", "sft", "swiftkv"]
