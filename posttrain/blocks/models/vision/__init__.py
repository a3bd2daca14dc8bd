"""Models of images and text: their `parts`, of which some are trained, and their `sight`, which is tried.

What they compute is in `causal`, where every network is; what they are given of images, in `blocks.images`.
"""
