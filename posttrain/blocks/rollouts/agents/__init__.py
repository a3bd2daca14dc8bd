"""Agents: code that asks the policy over HTTP, as it would ask any model, and learns to do what it does better.

`agent` is the block, `endpoint` the server that agents ask, `conversation` makes samples of what they ask, and
`agents` lets many of them run side by side. What is sampled is what is trained, as everywhere: by token ids.
"""
