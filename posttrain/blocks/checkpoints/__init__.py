"""What a run leaves behind, and goes on from.

`checkpoint` holds the blocks; `state` says which tensors a rank keeps, `writer` writes them while training goes on,
`manifest` says which checkpoint is whole.
"""
