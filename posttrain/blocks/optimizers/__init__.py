"""Optimizers besides AdamW: `blocks` names them for recipes; `elementwise` and `matrices` hold their steps.

`local` is what they know of sharded parameters, `rounding` rounds to bfloat16 at random.
"""
