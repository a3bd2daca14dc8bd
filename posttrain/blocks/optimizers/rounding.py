"""Rounding to bfloat16 at random, so that on average nothing is lost.

An update below half of the last bit vanishes when it is rounded to the nearest, step after step (a weight of 1 moves by
0.004 or not at all); rounded up with the probability of its size it does not (Gupta et al., arXiv:1502.02551; for
bfloat16 weights Zamirai et al., arXiv:2010.06192). The random bits are a function of step, tensor and place, so that
ranks that hold copies round alike, shards round as the whole would, and a run goes on bit by bit.
"""

import torch
from torch import Tensor

LOW = 0xFFFF


def signed(value: int) -> int:
    """Return a number of 32 bits as torch holds it."""
    return ((value + 2**31) % 2**32) - 2**31


def random_bits(count: int, first: int, key: int, device: torch.device) -> Tensor:
    """Return int32 [count], uniform over 32 bits: a mixed counter (Wellons' `lowbias32`, "Prospecting for Hash
    Functions", 2018).

    Args:
        count: how many.
        first: the place of the first in its tensor.
        key: of the tensor and the step.
        device: of the result.
    """
    bits = torch.arange(count, dtype=torch.int32, device=device) + signed(first % 2**32)
    bits ^= signed((key * 0x9E3779B1 + 0x7F4A7C15) % 2**32)
    for shift, keep, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B)):
        bits ^= (bits >> shift) & keep
        bits *= signed(factor)
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


def rounded(values: Tensor, first: int, key: int) -> Tensor:
    """Return float32 [n] as bfloat16, rounded up or down at random, in the proportion that keeps the mean.

    Args:
        values: finite or not; what is not finite stays what it is.
        first: see `random_bits`.
        key: see `random_bits`.
    """
    bits = values.contiguous().view(torch.int32) + (random_bits(values.numel(), first, key, values.device) & LOW)
    found = (bits & ~LOW).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), found, values.to(torch.bfloat16))
