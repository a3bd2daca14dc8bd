"""How ranks share the work.

`strategy` holds the blocks; `fsdp`, `deepspeed` and what they share (`sharding`, `shards`) stand behind it. `sequence`
is the block by which ranks share long rows, `ulysses` the exchange that it needs.
"""
