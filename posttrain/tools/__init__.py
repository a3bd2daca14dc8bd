"""What the command line offers beside training.

`commands` has a function for each; `show` and `plot` are to look at, `plan` and `fit` (with `tracing` and `alive`) and
`twin/` are to know beforehand, and `doctor` looks at the machine. What comes after training is in `afterwards/`, with
commands of its own.
"""
