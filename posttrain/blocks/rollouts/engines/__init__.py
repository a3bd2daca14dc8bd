"""Engines beside the trainer that say the replies: vLLM.

`weights` writes what the trainer holds, `wire` speaks with a server, `local` is an engine in this process, `served` the
sampler that keeps both in step and lets the engine prove it, and `vllm` holds the blocks.
"""
