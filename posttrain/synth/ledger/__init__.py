"""What was asked, answered and paid, in one SQLite file.

`database` is the file, `store` the requests and replies in it, `standing` how a task stands, `batches` those under way.
`keys` says what makes two requests the same, `replies` what an answer means; `session` records one run, `writer` what
comes at the same time, `ingest` the lines of a batch; `results` reads answers back, `pricing` counts what they cost.
"""
