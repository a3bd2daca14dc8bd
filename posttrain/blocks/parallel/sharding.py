"""What strategies that shard have in common: rank zero sends its weights, and every micro-batch reduces gradients.

A frozen network is put in place by `placed`; a network is built without weights, where it will get them or needs none,
inside `without_weights`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardingStrategy:
    """What a Fabric strategy that shards can do besides: put a network that is not trained onto all ranks."""

    def place(self, module: nn.Module) -> nn.Module:
        """Return the network with rank zero's weights; all ranks must call it."""
        raise NotImplementedError


def placed(module: nn.Module, fabric: Fabric) -> nn.Module:
    """Return a network that is not trained, where the run's strategy keeps it. All ranks must call it."""
    strategy = fabric.strategy
    return strategy.place(module) if isinstance(strategy, ShardingStrategy) else fabric.to_device(module)


class EveryMicroBatchSyncs(_BackwardSyncControl):
    """Putting a reduction off would keep gradients whole on every rank, which is what sharding is there to avoid."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Put nothing off."""
        return nullcontext()


def units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that transformers says must stay whole: the decoder layers.

    Not what only images reach (`seldom` of a network): ranks whose rows hold none would not gather it with the others.
    """
    whole = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    seldom = set(map(id, getattr(module, "seldom", ())))
    return (part for part in list(module.modules()) if type(part).__name__ in whole and id(part) not in seldom)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return what a network holds by name, as aliases: its own tensors may be moved and given up meanwhile."""
    both = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name: tensor.detach() for held in both for name, tensor in held}


def replace_tensors(module: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace everything that a network holds by what `make(name, tensor)` returns.

    Tied tensors stay tied, and parameters stay parameters.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that its id is not given to another
    for prefix, owner in module.named_modules():
        for held in (owner._parameters, owner._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(f"{prefix}.{name}" if prefix else name, tensor)
                    if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = tensor, new
                held[name] = made[id(tensor)][1]


def send(
    module: nn.Module,
    given: dict[str, Tensor],
    mesh: DeviceMesh | None,
    device: torch.device,
    keep: torch.device | None = None,
) -> None:
    """Fill a network with rank zero's weights, one tensor at a time. All ranks must call it.

    Args:
        module: perhaps sharded in place.
        given: what it held before, by name: rank zero's weights, on other ranks perhaps none.
        mesh: of the shards, if there are any.
        device: of this rank.
        keep: where its rows stay, unless on the device.
    """
    first = dist.get_rank() == 0

    def sent(name: str, held: Tensor) -> Tensor:
        whole = given[name].detach().to(device) if first else torch.empty_like(given[name], device=device)
        if not isinstance(held, DTensor):
            dist.broadcast(whole, 0)
            return whole
        rows = distribute_tensor(whole, mesh, held.placements)
        return rows.to(keep) if keep else rows

    replace_tensors(module, sent)


_weightless: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def weightless() -> Iterator[None]:
    """Build networks on the meta device meanwhile: for those who want to know their shapes alone."""
    token = _weightless.set(True)
    try:
        yield
    finally:
        _weightless.reset(token)


def only_shapes() -> bool:
    """Whether networks are built for their shapes alone, on no device."""
    return _weightless.get()


@contextmanager
def without_weights(fabric: Fabric | None) -> Iterator[bool]:
    """Build on the meta device where rank zero will send the weights, or nobody wants them; yields whether so."""
    if _weightless.get():
        yield True
        return
    if fabric is None or not isinstance(fabric.strategy, ShardingStrategy) or fabric.is_global_zero:
        yield False
        return
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        yield True
