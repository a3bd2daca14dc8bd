"""Images: what a model wants of them (`processor`, found by `loading`), and where their pixels come from (`pixels`).

Data blocks read and lay them out, networks see them; both know them by what is written here.
"""
