"""What a policy says while it is trained, and what that is worth: prompts, samplers, rewards, advantages.

`replies` holds the values that pass through; `prompts` are what is asked, `sampler` makes replies, `rewards` scores
them, `advantages` compares them, `groups` lays them out as a batch, and `ledger` writes them down. `engines` are
samplers beside the trainer, `turns` conversations with an environment.
"""
