"""The tensors that a run needs to go on, as each rank keeps them: ranges of flattened tensors (see parallel/shards.py).

One format (safetensors, which holds no code) serves all strategies: a rank writes the ranges that it keeps, and under
any strategy and any number of ranks a rank reads what it must have.
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
from torch.distributed.tensor import DTensor

from posttrain.blocks.optimizer import hidden_tensors, members, torch_optimizer
from posttrain.blocks.parallel.fsdp import start_of
from posttrain.blocks.parallel.shards import ParameterShard, TensorSlice
from posttrain.errors import CheckpointError

if TYPE_CHECKING:
    from posttrain.run import Run


def snapshot(run: "Run") -> dict[str, TensorSlice]:
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


def ranges(run: "Run") -> Iterator[tuple[str, TensorSlice]]:
    """Yield every range that this rank keeps, by name.

    Raises:
        CheckpointError: an optimizer keeps tensors where they cannot be found.
    """
    optimizers = members(torch_optimizer(run.optimizer))
    for optimizer in optimizers.values():
        if hidden := hidden_tensors(optimizer):
            raise CheckpointError(
                f"the optimizer {type(optimizer).__name__} keeps tensors in {', '.join(hidden)}, where checkpoints do "
                "not look, so a run could not go on: keep them in self.state[parameter]"
            )
    rank, world = run.fabric.global_rank, run.fabric.world_size
    for shard in run.strategy.shards(run):
        yield f"model/{shard.name}", shard.like(shard.values)
        for path, optimizer in optimizers.items():
            for name, value in optimizer.state.get(shard.owner, {}).items():
                key, value = f"optimizer/{shard.name}/{path and f'{path}:'}{name}", torch.as_tensor(value)
                if value.shape == shard.owner.shape:
                    yield key, shard.like(within(value, shard))
                elif isinstance(value, DTensor):  # cut like its parameter, but of another shape
                    start, rows = start_of(value), value.to_local().reshape(-1)
                    yield key, TensorSlice(tuple(value.shape), start, rows, shard.copies)
                else:
                    yield key, TensorSlice(tuple(value.shape), 0, value.reshape(-1), shard.copies)
    for name, buffer in buffers(run).items():
        yield f"model/{name}", TensorSlice(tuple(buffer.shape), 0, buffer.reshape(-1), (rank, world))
    for name, kept in run.tensors.items():
        yield f"tensors/{name}", kept


def within(value: Tensor, shard: ParameterShard) -> Tensor:
    """Return the range of a shard in a tensor of the optimizer's state, [n], as a view."""
    local = value.to_local() if hasattr(value, "to_local") else value
    return local.view(-1).narrow(0, shard.offset, shard.values.numel())


def buffers(run: "Run") -> dict[str, Tensor]:
    """Return the network's buffers that belong to its state."""
    module = run.model.module
    known = module.state_dict().keys() if any(True for _ in module.buffers()) else ()
    return {name: buffer for name, buffer in module.named_buffers() if name in known}


def write(found: dict[str, TensorSlice], file: Path) -> None:
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
        trained = {name: p for name, p in run.model.module.named_parameters() if p.requires_grad}
        parameters = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}  # of ZeRO-3, whole
        held = buffers(run)
        expected = {f"model/{name}": shape for name, shape in parameters.items()}
        expected |= {f"model/{name}": tuple(buffer.shape) for name, buffer in held.items()}
        there = {key: shape for key, shape in reader.shapes.items() if key.startswith("model/")}
        if differ := sorted(key for key in expected.keys() | there.keys() if expected.get(key) != there.get(key)):
            names = ", ".join(key.removeprefix("model/") for key in differ[:5])
            raise CheckpointError(f"{files[0].parent} holds other parameters than this model trains: {names}, ...")
        optimizers = members(torch_optimizer(run.optimizer))
        for shard in run.strategy.shards(run):
            reader.fill(f"model/{shard.name}", shard.start, shard.values)
            restore_optimizer(optimizers, shard, reader)
        for name, buffer in held.items():
            values = torch.empty(buffer.numel(), dtype=buffer.dtype)
            reader.fill(f"model/{name}", 0, values)
            buffer.copy_(values.view(buffer.shape))
        run.strategy.restored(run)
        for name, kept in run.tensors.items():
            if f"tensors/{name}" in reader.shapes:  # else it is new in this run, and stays as it was begun
                reader.fill(f"tensors/{name}", kept.start, kept.values)


def restore_optimizer(optimizers: dict[str, Any], shard: ParameterShard, reader: Reader) -> None:
    """Give the optimizers their state for a shard of a parameter; they may have none so far.

    Raises:
        CheckpointError: it is the state of another optimizer.
    """
    for name in reader.states.get(shard.name, ()):
        path, _, plain = name.rpartition(":")
        if path not in optimizers:
            raise CheckpointError(f"the checkpoint holds the state of an optimizer {path!r}, which this run has not")
        optimizer = optimizers[path]
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        key, state = f"optimizer/{shard.name}/{name}", optimizer.state[shard.owner]
        shape, dtype = reader.shapes[key], reader.dtype(key)
        if shape == shard.shape:
            if plain not in state:
                state[plain] = torch.zeros_like(shard.owner, dtype=dtype)
            reader.fill(key, shard.start, within(state[plain], shard))
        elif isinstance(state.get(plain), DTensor) and state[plain].shape == torch.Size(shape):
            reader.fill(key, start_of(state[plain]), state[plain].to_local().view(-1))
        else:
            values = torch.empty(shape, dtype=dtype)
            reader.fill(key, 0, values.view(-1))
            state[plain] = values.to(shard.owner.device) if plain != "step" or on_device else values
