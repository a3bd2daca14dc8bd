"""Clients, one for each kind of server: `tasks` is what is asked and what came, `client` what
all can do, `served` what those of servers share, `auth` how they show who they are.

`openai`, `anthropic`, `vllm`, `cortex` and `transformers` (a model in this process) are the blocks of a recipe.
"""
