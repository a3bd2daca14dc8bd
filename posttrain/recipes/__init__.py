"""From the text of a recipe to a trainer.

`load` goes all the way: text, overrides, code, trainer. `structure` makes blocks of data and finds every problem at
once, with `containers` and `scalars` for what their fields hold; `elsewhere` knows what other libraries call a key.
`explain` prints the keys of a block, `convert` reads ArcticTraining's recipes.
"""
