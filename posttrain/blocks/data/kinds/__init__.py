"""The data blocks, by what a row is: a conversation (`sft`), a pair (`preference`), a reply with a verdict
(`unpaired`), a text (`causal`). Prompts for reinforcement learning are in `blocks/rollouts`.
"""
