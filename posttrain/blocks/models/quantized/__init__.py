"""A base of 4 or 8 bits under adapters: `layers` computes with it, `quantize` makes it of a model.

`aware` trains whole weights for a model that will be quantized afterwards.

`fp8` computes products in fp8, of weights that stay as they are.

`sizes` says how many numbers of a network are of which type, quantized or not, and what they take.
"""
