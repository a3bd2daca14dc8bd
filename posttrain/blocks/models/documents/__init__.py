"""How the documents of a packed row are kept apart.

`ways` is what there is: attention of our own (`attention`, with `kernels` on GPUs), modules that go by document, rows
of their own. `probe` tries them on a `tiny` copy of the model and picks one: `trial` says when numbers are the same,
`leaks` finds the module that is to blame, `known` remembers what was picked.
"""
