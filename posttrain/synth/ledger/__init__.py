"""What was asked, answered and paid, in one SQLite file.

`store` is the file; `keys` says what makes two requests the same, `replies` what an answer means; `session` records one
run, `ingest` the lines of a batch; `results` reads answers back, `pricing` counts what they cost.
"""
