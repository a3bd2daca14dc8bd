"""A base of 4 or 8 bits under adapters: `layers` computes with it, `quantize` makes it of a model.

`sizes` says how many numbers of a network are of which type, quantized or not, and what they take.
"""
