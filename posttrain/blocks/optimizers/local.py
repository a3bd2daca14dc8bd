"""What a rank holds of a parameter that FSDP2 may have cut along its first dimension, and sums over all of it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.optim import Optimizer

CHUNK = 2**24
"""Numbers that are computed with at a time: what a step needs besides is as large as this, and not as a parameter."""


class Stepper(Optimizer):
    """An optimizer of one parameter after the other."""

    early = True
    """Whether states are there from the beginning, so that a checkpoint can fill them, whatever they look like."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)
        for _, parameter in self.each() if self.early else ():
            self.started(parameter)

    def each(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield all parameters with their groups."""
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            self.begin(group)
        for index, (group, parameter) in enumerate(self.each()):
            if parameter.grad is not None:
                state = self.started(parameter)
                state["step"] += 1
                self.change(parameter, parameter.grad, state, group, index)
        return loss

    def started(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0.0  # a plain number, which a plan can trace; from a checkpoint it comes as a tensor
            self.start(parameter, state)
        return state

    def begin(self, group: dict[str, Any]) -> None:
        """Take note of a step of a group."""

    def start(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Make the state of a parameter."""
        raise NotImplementedError

    def change(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        """Step a parameter."""
        raise NotImplementedError


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this rank holds, sharing their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pieces(*tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield equal parts of tensors of one shape, flat, and where they begin; what is written into them stays."""
    flat = [local(tensor).view(-1) for tensor in tensors]
    for begin in range(0, flat[0].numel(), CHUNK):
        yield begin, [part[begin : begin + CHUNK] for part in flat]


def grad_of(parameter: Tensor, grad: Tensor) -> Tensor:
    """Return this rank's rows of a gradient, in memory as those of the parameter."""
    return local(grad).contiguous().view_as(local(parameter))


def first_row(parameter: Tensor) -> int:
    """Return which row of the whole parameter is this rank's first."""
    if not isinstance(parameter, DTensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )  # fmt: skip
    return int(offset[0])


def summed(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the sum of a number, or of a row of them, over the ranks that share a parameter."""
    if not isinstance(parameter, DTensor):
        return value
    parts = [Partial() if isinstance(place, Shard) else Replicate() for place in parameter.placements]
    return DTensor.from_local(value, parameter.device_mesh, parts, run_check=False).full_tensor()


def zeros_by_row(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros with as many rows as a parameter, cut like it."""
    rows = local(parameter)
    zeros = torch.zeros((rows.shape[0], *shape[1:]), dtype=dtype, device=rows.device)
    if not isinstance(parameter, DTensor):
        return zeros
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
