"""One module per training method. Importing this package registers them; it imports nothing heavy.

`sft` is the shortest: a loss, and nothing else. `dpo`, `kto`, `reward` and `distill` train from preferences, verdicts
and teachers, `grpo`, `online_dpo` and `on_policy_distill` from what the model itself says; `swiftkv` and
`mlp_speculator` make models cheaper to serve. What several of them share is in `reference` and `rewarded`.
"""

from posttrain.trainers import (
    distill,
    dpo,
    grpo,
    kto,
    mlp_speculator,
    on_policy_distill,
    online_dpo,
    reward,
    sft,
    swiftkv,
)

__all__ = [
    "distill",
    "dpo",
    "grpo",
    "kto",
    "mlp_speculator",
    "on_policy_distill",
    "online_dpo",
    "reward",
    "sft",
    "swiftkv",
]
