"""Where metrics go.

`logger` holds the blocks, `console` what people see on a terminal, `ledger` the table of what became of their rows.
"""
