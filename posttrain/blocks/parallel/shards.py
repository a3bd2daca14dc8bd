"""What a rank keeps of tensors that may be divided among ranks, in a form that checkpoints can write.

DDP keeps parameters whole, FSDP2 keeps rows of them, ZeRO keeps ranges of parameters that were laid end to end. Each of
these is a range of a flattened tensor.
"""

import attrs
from torch import Tensor


@attrs.frozen(eq=False)
class TensorSlice:
    """A range of a flattened tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Where the range begins in the flattened tensor."""
    values: Tensor
    """[n]."""
    copies: tuple[int, int] = (0, 1)
    """Which of how many copies of the range this rank has: each copy's rank writes its share of all tensors."""


@attrs.frozen(eq=False)
class ParameterShard:
    """What a rank keeps of a trained parameter."""

    name: str
    """In the network."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """Where the range begins in the flattened parameter."""
    values: Tensor
    """[n], a view of what the optimizer changes."""
    owner: Tensor
    """What the optimizer knows it by: a key of its state, whose tensors are as large as this one."""
    offset: int = 0
    """Where the range begins in the optimizer's tensors, flattened."""
    copies: tuple[int, int] = (0, 1)
    """Which of how many copies of the range this rank has."""

    def like(self, values: Tensor) -> TensorSlice:
        """Return other values for the same range."""
        return TensorSlice(self.shape, self.start, values, self.copies)
