"""How many bytes of tensors there were at once: what `torch.cuda.max_memory_allocated` says on a GPU, on a CPU.

torch's allocator for CPUs keeps no such count, but tells the profiler of every block that it hands out and takes back. So
what operators need inside is counted, too; memory of Python and of libraries is not. Counted is from the start of the
profiler: blocks from before belong to the caller, who knows what is there.
"""

from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def recorder() -> profile:
    """Return a profiler to start and stop, or to use as a context."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def most(recorded: profile) -> int:
    """Return the most bytes that were alive at once, of those that were made while it recorded."""
    inside = recorded.profiler
    assert inside is not None and inside.kineto_results is not None, "it has not been stopped"
    blocks = [event for event in inside.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for block in sorted(blocks, key=lambda event: event.start_ns()):  # of blocks from before nothing is told
        now += block.nbytes()
        peak = max(peak, now)
    return peak


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors that are there, once for those that share them."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
