"""From the text of a recipe to a trainer.

`load` goes all the way: text, overrides, code, trainer. `structure` makes blocks of data and finds every problem at
once, `scalars` reads words and numbers; `explain` prints the keys of a block, `convert` reads ArcticTraining's recipes.
"""
