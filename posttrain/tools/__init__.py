"""What the command line offers beside training.

`commands` has a function for each; `show` and `plot` are to look at, `plan` (with `tracing`) and `twin` (with `proofs`)
are to know beforehand, `accept` measures a speculator, `doctor` the machine.
"""
