"""How many bytes of tensors are alive: counted operation by operation, so the same on every machine."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Alive(TorchDispatchMode):
    """Counts the storages that operations make, until they are given up."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum(self.sizes.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        known = set()
        tree_map_only(torch.Tensor, lambda tensor: known.add(tensor.untyped_storage()._cdata), (args, kwargs))
        tree_map_only(torch.Tensor, lambda tensor: self.note(tensor, known), out)
        self.peak = max(self.peak, self.now)
        return out

    def note(self, tensor: torch.Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes and key not in known:  # what was there before is not ours
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
