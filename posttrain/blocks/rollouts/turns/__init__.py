"""Conversations of several turns: environments that answer the policy, and tools.

`calls` reads how a chat template writes tool calls, and `conversations` lets policy and environment talk, by tokens.
The environment that runs tools is synth/environments.py.
"""
