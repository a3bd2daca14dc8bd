"""Networks.

`model` holds the blocks of a recipe (`lora` is a part of one). The networks that they build have `packed` in common:
`causal` and `reward`. `documents` is about how packed documents are kept apart, `activations` about memory; `frozen`
holds references. Each kind of model has a room: `experts`, `quantized`, `vision`, `swiftkv`, `speculator`.
"""
