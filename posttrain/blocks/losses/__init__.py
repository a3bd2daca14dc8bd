"""Loss formulas, as pure functions of tensors.

`cross_entropy` is what all methods stand on: a head whose logits are never held at once. `preference` has the losses of
pairs, `joint` those that look at a whole step, `divergence` how far a student is from its teacher.
"""
