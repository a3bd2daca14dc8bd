"""The numbers of a network by type, and the bytes that they take: for the header of a run and for plans."""

import math
from collections.abc import Iterator
from typing import get_args

import attrs
import torch
from torch import nn

from posttrain.blocks.models.quantized.layers import Kind, codes
from posttrain.words import human


@attrs.frozen(str=False)
class Group:
    """Parameters of one type that are trained, or not."""

    type: str
    """Of torch, or of `model.quantize`."""
    trained: bool
    numbers: int
    bytes: int

    @property
    def bits(self) -> float:
        """What a number takes, with its share of scales."""
        return 8 * self.bytes / self.numbers

    def __str__(self) -> str:
        """Return it in words."""
        bits = f" of {self.bits:.2f} bits" if self.type in get_args(Kind) else ""
        trained = "trained" if self.trained else "frozen"
        return f"{human(self.numbers)} {trained} in {self.type}{bits}, {self.bytes / 1e6:,.1f} MB"


def groups(network: nn.Module) -> list[Group]:
    """Return the parameters of a network by type, what is trained first; a quantized number counts as one."""
    found: dict[tuple[bool, str], tuple[int, int]] = {}

    def add(trained: bool, kind: str, numbers: int, size: int) -> None:
        before = found.get((trained, kind), (0, 0))
        found[trained, kind] = before[0] + numbers, before[1] + size

    for code in codes(network):
        add(False, code.kind, math.prod(code.shape), sum(code.sizes))
    for parameter in plain(network):
        kind = str(parameter.dtype).removeprefix("torch.")
        add(parameter.requires_grad, kind, parameter.numel(), parameter.numel() * parameter.element_size())
    return [Group(kind, trained, *sizes) for (trained, kind), sizes in sorted(found.items(), reverse=True)]


def plain(network: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are numbers, and not bytes that stand for some."""
    return (parameter for parameter in network.parameters() if parameter.dtype != torch.uint8)
