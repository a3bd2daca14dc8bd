"""One `Fabric`, however the process was started: plainly, by `fabric run`, or by `torchrun`."""

import atexit
import hashlib
import os
import random
from typing import TYPE_CHECKING, Any

from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor


def make_fabric(
    *, accelerator: str, devices: int | str, num_nodes: int, precision: str | None, strategy: Any
) -> "Fabric":
    """Return a launched Fabric.

    A device count of `auto` means what the launcher says: `fabric run --devices`, `torchrun
    --nproc-per-node`; without a launcher it means every GPU there is, or one CPU process.

    Raises:
        RecipeError: the recipe and the launcher ask for different things.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    asked = {"accelerator": accelerator, "devices": devices, "strategy": strategy, "precision": precision}
    if num_nodes != 1:
        asked["num_nodes"] = num_nodes
    asked = {name: value for name, value in asked.items() if value not in ("auto", None)}
    by_fabric_run = bool(int(os.environ.get("LT_CLI_USED", "0")))
    if by_fabric_run:
        _drop_what_the_launcher_set(asked)
    elif TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
        for name, value in (("devices", local), ("num_nodes", nodes)):
            if asked.setdefault(name, value) != value:
                raise RecipeError(f"{name}: the recipe says {asked[name]}, but torchrun started {value}")
    elif "devices" not in asked and _on_cpu(accelerator):
        asked["devices"] = 1
    if "LT_PRECISION" not in os.environ:
        asked.setdefault("precision", "32-true" if _on_cpu(accelerator) else "bf16-mixed")
    try:
        fabric = Fabric(**asked)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"accelerator, devices, precision and strategy do not go together: {error}") from error
    if not by_fabric_run:
        fabric.launch()
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Close the connections to the other ranks before the interpreter goes; gloo aborts if they break later."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _drop_what_the_launcher_set(asked: dict[str, Any]) -> None:
    for name in list(asked):
        given = os.environ.get(f"LT_{name.upper()}")
        if given is None:
            continue
        if str(asked[name]) != given:
            raise RecipeError(
                f"{name}: the recipe says {asked[name]!r}, but `fabric run` was given "
                f"--{name.replace('_', '-')}={given}; leave one of them out"
            )
        del asked[name]


def _on_cpu(accelerator: str) -> bool:
    if accelerator != "auto":
        return accelerator == "cpu"
    import torch

    return os.environ.get("LT_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def all_reduce(fabric: "Fabric", tensor: "Tensor", op: str = "SUM") -> "Tensor":
    """Reduce a tensor over all ranks, in place; on GPUs the host does not wait for it.

    Fabric's own `all_reduce` puts a barrier in front, which does wait.
    """
    if fabric.world_size > 1:
        import torch.distributed

        torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, op))
    return tensor


def gather_rows(fabric: "Fabric", tensor: "Tensor") -> "list[Tensor]":
    """Return every rank's rows of a tensor [n, ...]; n may differ between ranks."""
    if fabric.world_size == 1:
        return [tensor]
    import torch
    from torch.distributed import all_gather

    count = torch.tensor(len(tensor), device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(fabric.world_size)]
    all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in sizes]
    all_gather(gathered, padded)
    return [rows[:size] for rows, size in zip(gathered, sizes, strict=True)]


def gather_objects(fabric: "Fabric", value: Any) -> list[Any]:
    """Return every rank's value."""
    if fabric.world_size == 1:
        return [value]
    from torch.distributed import all_gather_object

    found: list[Any] = [None] * fabric.world_size
    all_gather_object(found, value)
    return found


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank), so that a resumed run draws what an uninterrupted one would."""
    import numpy as np
    import torch

    mixed = int.from_bytes(hashlib.blake2b(f"{seed},{step},{rank}".encode(), digest_size=8).digest(), "big")
    torch.manual_seed(mixed % 2**63)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)
