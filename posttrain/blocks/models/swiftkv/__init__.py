"""SwiftKV: upper layers that take keys and values from one lower layer.

`model` is the block, `config` its families and costs, `modeling` the classes that transformers loads, `network` what
the trainer calls.
"""
