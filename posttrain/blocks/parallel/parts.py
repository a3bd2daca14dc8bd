"""What a rank keeps of each trained parameter, in the form that every strategy can give and a checkpoint can write."""

import attrs
from torch import Tensor


@attrs.frozen(eq=False)
class Part:
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
