"""Networks.

`model` holds the blocks of a recipe (`lora` is a part of one), `causal` and `reward` the networks that they build. How
packed documents are kept apart is the matter of `documents`, memory that of `activations`; `frozen` holds references.
Each kind of model has a room: `experts`, `quantized`, `vision`, `swiftkv`, `speculator`.
"""
