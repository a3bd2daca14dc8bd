"""The bytes that are alive as operators are called one after the other, on tensors with or without numbers.

Without numbers the same operators are called, but what a kernel needs inside is not seen, and autograd does not add in
place: both are known here by name.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from posttrain.blocks.callbacks.operations import operations

COPIES = (torch.ops.aten.logsumexp.default,)
"""Operators that need a copy of what they are given while they work."""


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, until they are given up, and what is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.now = self.peak = self.operations = 0
        self.moments = [(0, 0)]
        """(bytes of gradients that are complete, the most bytes that were alive until the next one was)."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = called(function, args, kwargs or {})
        self.operations += operations(function, args, kwargs or {}, out)
        known: set[int] = set()
        tree_map_only(Tensor, lambda tensor: known.add(tensor.untyped_storage()._cdata), (args, kwargs))
        tree_map_only(Tensor, lambda tensor: self.note(tensor, known), out)
        if not summed_in_place(function):
            now = self.now + (args[0].nbytes if function in COPIES else 0)
            self.peak = max(self.peak, now)
            self.moments[-1] = self.moments[-1][0], max(self.moments[-1][1], now)
        return out

    def take(self, gradient: Tensor) -> None:
        """Count a gradient that is complete by itself; whoever calls gives it up."""
        self.moments.append((self.moments[-1][0] + gradient.nbytes, 0))

    def note(self, tensor: Tensor, known: set[int]) -> None:
        """Count a tensor's storage, unless it was there before."""
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.sizes and key not in known:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """Take a storage out of the count."""
        self.now -= self.sizes.pop(key)


def summed_in_place(function: Any) -> bool:
    """Whether autograd itself adds up two gradients of one tensor, such as a tied embedding. Real tensors are added in
    place; those without numbers are not, but then both are given up before anything else is made."""
    if function is not torch.ops.aten.add.Tensor or torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return False  # forward, or computed again in a backward pass
    return not isinstance(torch._C._current_autograd_node(), BackwardCFunction)  # which may add on its own


def called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator. Products of experts in float32, which CPUs compute, have shapes in bfloat16 alone."""
    if function is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
        halves = [arg.bfloat16() for arg in args[:2]]
        return function(*halves, *args[2:], **kwargs).to(args[0].dtype)
    return function(*args, **kwargs)
