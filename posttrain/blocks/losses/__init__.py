"""Loss formulas, as pure functions of tensors.

`cross_entropy` is what all methods stand on: a head whose logits are never held at once. `preference` has the losses of
pairs, `objective` their names and weights, `joint` those that look at a whole step; `divergence` is for teachers.
"""
