"""Networks.

`model` holds the blocks of a recipe (`lora` is a part of one), and `assembly` makes networks of them: `causal` and
`reward`, which have `packed` in common. `documents` is about how packed documents are kept apart, `activations` about
memory; `frozen` holds references. Each kind of model has a room: `experts`, `quantized`, `vision`, `swiftkv`,
`speculator`.
"""
