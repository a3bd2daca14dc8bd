"""How many bytes of tensors there were at once: what `torch.cuda.max_memory_allocated` says on a GPU, on a CPU.

torch's allocator for CPUs keeps no such count, but tells the profiler of every block that it hands out and takes back. So
what operators need inside is counted, too; memory of Python and of libraries is not.
"""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from posttrain import before
from posttrain.blocks.optimizer import torch_optimizer


def most(work: Callable[[], Any]) -> int:
    """Return the most bytes that were alive at once, of those that some work made."""
    with recorder() as record:
        work()
    return peak(record)


def training(trainer: Any) -> int:
    """Train, and return the most bytes that were alive at once: the network and its optimizer, and what steps made."""
    record, there = recorder(), 0

    @before("trainer.fit")
    def start(trainer: Any) -> None:
        nonlocal there
        own(trainer.run.model)
        gc.collect()  # a file that is let go of would be counted
        states = torch_optimizer(trainer.run.optimizer).state.values()
        tensors = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
        there = held([*trainer.run.model.parameters(), *trainer.run.model.buffers(), *tensors])
        record.start()

    trainer.train(callbacks=[start])
    record.stop()
    return there + peak(record)


def own(model: torch.nn.Module) -> None:
    """Copy parameters out of their files, as moving them to a GPU would do."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors, once for those that share them."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def recorder() -> profile:
    """Return a profiler that is told of blocks."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def peak(record: profile) -> int:
    """Return the most bytes of blocks at once, of those that were handed out while it recorded."""
    assert record.profiler is not None and record.profiler.kineto_results is not None, "it has not been stopped"
    blocks = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = found = 0
    for block in sorted(blocks, key=lambda event: event.start_ns()):
        now += block.nbytes()
        found = max(found, now)
    return found
