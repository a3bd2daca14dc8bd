"""Rows -> tokens: `encoders` says how, `processes` spreads the work over cores (`worker` runs in each of them).

`fingerprints` tells when a table of the cache can be used again.
"""
