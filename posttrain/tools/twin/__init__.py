"""`posttrain check --twin`: a recipe tried out on a tiny copy of what it describes.

`twin` is the copy, with `stand_ins` for what would take long or differ each time; `masks` and `proofs` are the checks,
of rows and of steps; `processes` are those that a check starts.
"""
