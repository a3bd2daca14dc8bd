"""The tensors that a run needs to go on, as each rank keeps them: ranges of flattened tensors.

DDP keeps parameters whole, FSDP2 keeps rows of them, ZeRO keeps ranges of parameters that were laid end to end. Each of
these is a range of a flattened tensor. So one format (safetensors, which holds no code) serves all: a rank writes the
ranges that it keeps, and under any strategy and any number of ranks a rank reads what it must have.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import attrs
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.blocks.optimizer import torch_optimizer
from posttrain.blocks.parallel.parts import Part
from posttrain.errors import CheckpointError

if TYPE_CHECKING:
    from posttrain.run import Run


@attrs.frozen(eq=False)
class Range:
    """A range of a flattened tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    values: Tensor
    """[n]."""
    copies: tuple[int, int] = (0, 1)


def snapshot(run: "Run") -> dict[str, Range]:
    """Return copies, in the memory of the host, of the ranges that this rank is to write.

    Of what several ranks keep, each writes its share. Frozen parameters are left out: they come from where they came
    from. Random numbers need no place: every step is seeded by its number.
    """
    mine = {}
    for key, found in ranges(run):
        copy, copies = found.copies
        if crc32(key.encode()) % copies == copy and found.values.numel():
            values = found.values.detach().to("cpu", copy=True)
            mine[key] = attrs.evolve(found, values=values)
    return mine


def ranges(run: "Run") -> Iterator[tuple[str, Range]]:
    """Yield every range that this rank keeps, by name."""
    optimizer = torch_optimizer(run.optimizer)
    rank, world = run.fabric.global_rank, run.fabric.world_size
    for part in run.strategy.parts(run):
        yield f"model/{part.name}", Range(part.shape, part.start, part.values, part.copies)
        for name, value in optimizer.state.get(part.owner, {}).items():
            value = torch.as_tensor(value)
            if value.shape == part.owner.shape:
                yield f"optimizer/{part.name}/{name}", Range(part.shape, part.start, within(value, part), part.copies)
            else:
                yield f"optimizer/{part.name}/{name}", Range(tuple(value.shape), 0, value.reshape(-1), part.copies)
    for name, buffer in buffers(run).items():
        yield f"model/{name}", Range(tuple(buffer.shape), 0, buffer.reshape(-1), (rank, world))


def within(value: Tensor, part: Part) -> Tensor:
    """Return the range of a part in a tensor of the optimizer's state, [n], as a view."""
    local = value.to_local() if hasattr(value, "to_local") else value
    return local.view(-1).narrow(0, part.offset, part.values.numel())


def buffers(run: "Run") -> dict[str, Tensor]:
    """Return the network's buffers that belong to its state."""
    module = run.model.module
    known = module.state_dict().keys() if any(True for _ in module.buffers()) else ()
    return {name: buffer for name, buffer in module.named_buffers() if name in known}


def write(found: dict[str, Range], file: Path) -> None:
    """Write ranges to a safetensors file; its metadata say where in which tensors they lie."""
    where = {key: [part.start, *part.shape] for key, part in found.items()}
    save_file({key: part.values for key, part in found.items()}, file, metadata={"ranges": json.dumps(where)})


class Reader:
    """The ranges in the files of a checkpoint, put together as they are asked for."""

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self.found: dict[str, dict[tuple[int, int], Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.states: dict[str, list[str]] = {}
        """Parameter -> the names of what the optimizer keeps for it."""
        for path in files:
            file = stack.enter_context(safe_open(path, "pt"))
            for key, (start, *shape) in json.loads(file.metadata()["ranges"]).items():
                part = file.get_slice(key)
                if key not in self.shapes and key.startswith("optimizer/"):
                    parameter, _, name = key.removeprefix("optimizer/").rpartition("/")
                    self.states.setdefault(parameter, []).append(name)
                self.shapes[key] = tuple(shape)
                self.found.setdefault(key, {})[start, start + part.get_shape()[0]] = part

    def fill(self, key: str, start: int, values: Tensor) -> None:
        """Copy numbers of a tensor, from `start` on, into `values` [n].

        Raises:
            CheckpointError: some of them are in no file.
        """
        stop, filled = start + values.numel(), 0
        for (begin, end), part in self.found.get(key, {}).items():
            low, high = max(start, begin), min(stop, end)
            if low < high:
                values[low - start : high - start].copy_(part[low - begin : high - begin])
                filled += high - low
        if filled < values.numel():
            raise CheckpointError(f"the checkpoint holds {filled:,} of {values.numel():,} numbers of {key}")

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor's numbers."""
        first = next(iter(self.found[key].values()))
        empty: Tensor = first[:0]
        return empty.dtype


@torch.no_grad()
def restore(run: "Run", files: list[Path]) -> None:
    """Put the state in the files of a checkpoint into a run.

    Raises:
        CheckpointError: it is the state of other parameters.
    """
    with ExitStack() as stack:
        try:
            reader = Reader(files, stack)
        except Exception as error:  # safetensors has an exception of its own for each of its formats' rules
            raise CheckpointError(f"{files[0].parent} does not hold safetensors files: {error}") from None
        parameters = {name: shape_of(p) for name, p in run.model.module.named_parameters() if p.requires_grad}
        held = buffers(run)
        expected = {f"model/{name}": shape for name, shape in parameters.items()}
        expected |= {f"model/{name}": tuple(buffer.shape) for name, buffer in held.items()}
        there = {key: shape for key, shape in reader.shapes.items() if key.startswith("model/")}
        if differ := sorted(key for key in expected.keys() | there.keys() if expected.get(key) != there.get(key)):
            names = ", ".join(key.removeprefix("model/") for key in differ[:5])
            raise CheckpointError(f"{files[0].parent} holds other parameters than this model trains: {names}, ...")
        optimizer = torch_optimizer(run.optimizer)
        for part in run.strategy.parts(run):
            reader.fill(f"model/{part.name}", part.start, part.values)
            restore_optimizer(optimizer, part, reader)
        for name, buffer in held.items():
            values = torch.empty(buffer.numel(), dtype=buffer.dtype)
            reader.fill(f"model/{name}", 0, values)
            buffer.copy_(values.view(buffer.shape))
        run.strategy.restored(run)


def restore_optimizer(optimizer: Any, part: Part, reader: Reader) -> None:
    """Give the optimizer its state for a part of a parameter; it may have none so far."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name in reader.states.get(part.name, ()):
        key, state = f"optimizer/{part.name}/{name}", optimizer.state[part.owner]
        shape, dtype = reader.shapes[key], reader.dtype(key)
        if shape == part.shape:
            if name not in state:
                state[name] = torch.zeros_like(part.owner, dtype=dtype)
            reader.fill(key, part.start, within(state[name], part))
        else:
            values = torch.empty(shape, dtype=dtype)
            reader.fill(key, 0, values.view(-1))
            state[name] = values.to(part.owner.device) if name != "step" or on_device else values


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
