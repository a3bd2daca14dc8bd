"""Clients, one for each kind of server: `client` is what all can do, `auth` how they show who they are.

`openai`, `anthropic`, `vllm`, `cortex` and `transformers` (a model in this process) are the blocks of a recipe.
"""
