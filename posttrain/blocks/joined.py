"""Several optimizers as one, such as Muon for matrices and AdamW for the rest."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class JoinedOptimizer(Optimizer):
    """Optimizers of different parameters behind one interface; schedules, clipping and checkpoints see all groups.

    >>> import torch
    >>> weight, bias = torch.nn.Linear(2, 2).parameters()
    >>> both = JoinedOptimizer(fast=torch.optim.SGD([weight], lr=0.1), slow=torch.optim.SGD([bias], lr=0.01))
    >>> [(group["name"], group["lr"]) for group in both.param_groups]
    [('fast', 0.1), ('slow', 0.01)]
    """

    def __init__(self, **optimizers: Optimizer) -> None:
        groups = []
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group.setdefault("name", name)  # its learning rate is logged as lr/NAME
                groups.append(group)
        super().__init__(groups, {})
        self.optimizers = optimizers
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all of them."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let all of them work on the groups and the state of this one: there is each of them only once."""
        at = 0
        for optimizer in self.optimizers.values():
            count = len(optimizer.param_groups)
            self.state.update(optimizer.state)
            optimizer.param_groups, optimizer.state = self.param_groups[at : at + count], self.state
            at += count
