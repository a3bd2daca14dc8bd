"""Conversations of several turns: environments that answer the policy, and tools.

`calls` reads how a chat template writes tool calls, `tools` is the environment that runs them, and `conversations` lets
policy and environment talk, by tokens.
"""
