"""Rows in, micro-batches out.

Read `data` (what data blocks share) and `kinds` first; then along a row: `sources`, `readers`, `formats`, `schemas` and
`pairs`, `chat`, `encoding`, `store`, `views` or `streams`, `packing`, `loader`. `recorded` keeps what references and
teachers said of the rows.
"""
