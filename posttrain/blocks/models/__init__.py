"""Networks.

`model` holds the blocks of a recipe, `causal` and `reward` the networks that they build, `attention` what keeps packed
documents apart; then `activations` (memory) and `frozen` (references). SwiftKV and speculators have rooms of their own.
"""
