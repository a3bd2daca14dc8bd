"""What the command line offers beside training.

`commands` has a function for each; `show` and `plot` are to look at, `plan` and `fit` (with `tracing` and `alive`) and
`twin` (with `proofs`) are to know beforehand, what comes after training is in `afterwards/`, and `doctor` looks at the
machine.
"""
