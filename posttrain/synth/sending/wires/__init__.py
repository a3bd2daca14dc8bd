"""Interfaces other than OpenAI's: a chat in OpenAI's shape -> their request, their answer -> a chat completion.

`anthropic`, `gemini` and `bedrock` have one each; `anthropic_batches` and `gemini_batches` their batches; `parts` is
what they share, and `dialect` how they are asked.
"""
