"""Mixtures of experts: the losses of their routers (router), how evenly tokens are spread and the biases that see to it
(load), and the precision that experts compute in (precision).
"""
