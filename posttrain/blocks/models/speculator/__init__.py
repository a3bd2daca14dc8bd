"""Heads that draft the next tokens of a base model.

`model` is the block, `files` what is exported, `network` the heads, `continuation` the base model's own words to train
on, `speculate` generation with drafts.
"""
