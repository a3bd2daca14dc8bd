"""What a frozen network says of the training data, asked once and kept on disk.

A recording holds numbers for every supervised token of every example, in the order of the examples at rest, so that
any packing, order and number of ranks reads the same ones. It is keyed by the content of the network, of the data and
of what was asked. The pass that makes it can be broken off at any time and goes on where it was.
"""

import functools
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from posttrain.batch import Batch, Extra
from posttrain.blocks.data.data import Data
from posttrain.blocks.data.loader import MapLoader
from posttrain.blocks.data.packing import chunks, plan
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.models.frozen import Frozen
from posttrain.errors import DataError, RecipeError
from posttrain.interfaces import Fingerprinted, ModelBlock
from posttrain.runtime.launch import all_reduce
from posttrain.values import default_cache

if TYPE_CHECKING:
    from posttrain.run import Run

FORMAT = 1
CHUNK = 64
"""Examples that are asked about, synced and ticked off together."""
log = logging.getLogger("posttrain")

Shapes: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]
"""Name of each array -> its numpy type, and the shape of what it holds for a token."""
Ask: TypeAlias = Callable[[Batch], dict[str, Tensor]]
"""Batch -> [n, *shape] for each array, in the order of the batch's supervised tokens."""


@attrs.frozen(eq=False)
class Recording:
    """Numbers for every supervised token, memory-mapped."""

    arrays: dict[str, np.ndarray]
    offsets: np.ndarray
    """int64 [examples + 1], where each example's tokens begin."""

    def of(self, indices: list[int]) -> dict[str, Extra]:
        """Return the numbers of some examples: [n, *shape] for each array."""
        parts = [slice(*self.offsets[index : index + 2]) for index in indices]
        found = {name: np.concatenate([array[part] for part in parts]) for name, array in self.arrays.items()}
        return {name: Extra(torch.from_numpy(array), "target") for name, array in found.items()}


@attrs.frozen(eq=False)
class Recorder:
    """Makes recordings of one network for the loaders of a run."""

    run: "Run"
    cache: Path
    network: str
    """What identifies its content."""
    asked: dict[str, Any]
    """What identifies the question: plain JSON data."""
    shapes: Shapes

    def recording(self, loader: MapLoader, teacher: Callable[[], Ask]) -> Recording:
        """Return the recording for a loader's examples, made now as far as it is not there yet.

        All ranks must call it; each asks about its part of what is missing.

        Args:
            loader: of the examples.
            teacher: loads the network, if it is needed, and returns what asks it.
        """
        content, offsets = survey(loader)
        said = [FORMAT, self.network, content, self.asked, self.shapes, self.run.fabric.strategy.precision.precision]
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
        folder = self.run.fabric.broadcast(self.cache / "recorded" / key)
        try:
            if self.run.fabric.is_global_zero and not is_complete(folder):
                self._allocate(folder, int(offsets[-1]), len(offsets) - 1)
            self.run.fabric.barrier()
            self._fill(folder, loader, offsets, teacher)
        except OSError as error:
            raise DataError(
                f"the cache folder {folder} cannot be written: {error.strerror or error}; set data.cache_dir or "
                "$POSTTRAIN_CACHE"
            ) from error
        self.run.fabric.barrier()
        arrays = {
            name: np.asarray(np.memmap(folder / name, dtype=kind, mode="r", shape=(int(offsets[-1]), *shape)))
            for name, (kind, shape) in self.shapes.items()
        }
        return Recording(arrays, offsets)

    def _bytes(self, name: str) -> int:
        """Return the size of what an array holds for a token."""
        kind, shape = self.shapes[name]
        return math.prod(shape) * np.dtype(kind).itemsize

    def _allocate(self, folder: Path, tokens: int, examples: int) -> None:
        """Make the files at their full size; where two runs do so at once, they do the same."""
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {name: tokens * self._bytes(name) for name in self.shapes}
        for name, size in {**sizes, "done": -(-examples // CHUNK)}.items():
            with (folder / name).open("ab") as file:
                file.truncate(size)

    def _fill(self, folder: Path, loader: MapLoader, offsets: np.ndarray, teacher: Callable[[], Ask]) -> None:
        """Ask about the chunks that are not ticked off, this rank's part of them."""
        fabric = self.run.fabric
        missing: list[int] = fabric.broadcast(np.flatnonzero(~np.fromfile(folder / "done", dtype=bool)).tolist())
        if not missing:
            return
        ask = InStep(teacher(), self.run)
        examples = len(offsets) - 1
        left = sum(min(CHUNK, examples - chunk * CHUNK) for chunk in missing)
        log.info("recording the answers of the teacher or reference: %s of %s examples", f"{left:,}", f"{examples:,}")
        handles = {name: os.open(folder / name, os.O_WRONLY) for name in (*self.shapes, "done")}
        try:
            mine = missing[fabric.global_rank :: fabric.world_size]
            for chunk in track(mine, "recording answers", disable=not (fabric.is_global_zero and sys.stderr.isatty())):
                indices = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(offsets) - 1))
                for index, found in self._asked(loader, indices, offsets, ask):
                    for name, numbers in found.items():
                        content = numbers.astype(self.shapes[name][0]).tobytes()
                        os.pwrite(handles[name], content, int(offsets[index]) * self._bytes(name))
                for name in self.shapes:
                    os.fsync(handles[name])
                os.pwrite(handles["done"], b"\x01", chunk)  # only now: what is ticked off is on disk
            ask.finish(self.run.to_device(loader.batch([[0]])))
        finally:
            for handle in handles.values():
                os.close(handle)

    def _asked(
        self, loader: MapLoader, indices: range, offsets: np.ndarray, ask: Ask
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield the numbers of each example."""
        order = np.arange(indices.start, indices.stop)
        rows = plan(order, loader.examples.lengths, loader.max_length) if loader.packing else [[i] for i in indices]
        for group in chunks(rows, loader.micro_batch_size):
            found = {name: x.cpu().numpy() for name, x in ask(self.run.to_device(loader.batch(group))).items()}
            at = 0
            for index in (index for row in group for index in row):
                size = int(offsets[index + 1] - offsets[index])
                yield index, {name: numbers[at : at + size] for name, numbers in found.items()}
                at += size


@attrs.frozen(eq=False)
class InStep:
    """Asks in step with the other ranks, if the network is sharded: each must take part in every pass."""

    ask: Ask
    run: "Run"

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the network's answer."""
        self.some_rank_asks(True)
        return self.ask(batch)

    def finish(self, batch: Batch) -> None:
        """Take part, with any batch, in what other ranks have left to ask."""
        while self.some_rank_asks(False):
            self.ask(batch)

    def some_rank_asks(self, this_one: bool) -> bool:
        """Whether some rank has something to ask, if this one must know; all ranks must call it."""
        if not self.run.strategy.shards_parameters:
            return False
        fabric = self.run.fabric
        return bool(all_reduce(fabric, torch.tensor(float(this_one), device=fabric.device)))


def is_complete(folder: Path) -> bool:
    """Whether every chunk of a recording is ticked off."""
    return (folder / "done").is_file() and bool(np.fromfile(folder / "done", dtype=bool).all())


def record(run: "Run", recorder: Recorder, teacher: Callable[[], Ask]) -> None:
    """Give the loaders of a run a recording of their examples.

    Raises:
        RecipeError: they read streams.
    """
    made: dict[str, Any] = {}
    for name in ("train", "eval"):
        loader = getattr(run.loaders, name)
        if loader is None:
            continue
        if not isinstance(loader, MapLoader):
            raise RecipeError("a network can only be asked ahead about data at rest, not about a stream")
        made[name] = attrs.evolve(loader, extra=recorder.recording(loader, teacher))
    run.loaders = attrs.evolve(run.loaders, **made)


def record_targets(run: "Run", name: str, data: Any) -> None:
    """Let a frozen network score the targets of all examples, and free it: batches then hold `NAME_log_probs`, [n]."""
    network = run.frozen[name]
    content = content_of(network.module)  # type: ignore[arg-type]
    recorder = Recorder(run, cache_of(data), content, {"asked": "targets"}, {f"{name}_log_probs": ("float32", ())})
    record(run, recorder, lambda: lambda batch: {f"{name}_log_probs": network(batch, "log_probs")})
    del run.frozen[name]


def record_top(run: "Run", block: ModelBlock, data: Any, k: int, temperature: float) -> None:
    """Let a teacher say its k likeliest tokens for all examples; batches then hold what `top_answers` returns.

    The teacher is loaded only if something is missing, and freed afterwards.
    """
    vocabulary: int = run.model.module.vocabulary  # type: ignore[assignment]

    @functools.cache
    def teacher() -> Frozen:
        return Frozen(block.build(run.fabric), run.fabric)

    identity = block.fingerprint() if isinstance(block, Fingerprinted) else None
    asked = {"asked": "top", "k": k, "temperature": temperature, "vocabulary": vocabulary}
    shapes: Shapes = {"teacher_log_probs": ("float32", (k,)), "teacher_tokens": ("int32", (k,))}
    recorder = Recorder(run, cache_of(data), identity or content_of(teacher().module), asked, shapes)
    record(run, recorder, lambda: lambda batch: top_answers(teacher(), batch, k, temperature, vocabulary))


def top_answers(teacher: nn.Module, batch: Batch, k: int, temperature: float, vocabulary: int) -> dict[str, Tensor]:
    """Return the teacher's likeliest tokens at the supervised positions of a batch.

    Returns:
        teacher_log_probs: float32 [n, k], at the given temperature, over the vocabulary of teacher and student.
        teacher_tokens: int64 [n, k].

    Raises:
        RecipeError: the teacher knows fewer than k tokens.
    """
    assert isinstance(teacher, Frozen)
    network: Any = teacher.module
    if network.vocabulary < k:
        raise RecipeError(f"top_k is {k:,}, but the teacher has a vocabulary of {network.vocabulary:,}")
    with teacher.asking():
        log_probs, tokens = network.top_log_probs(batch, k, temperature, vocabulary)
    return {"teacher_log_probs": log_probs, "teacher_tokens": tokens}


def cache_of(data: Any) -> Path:
    """Return the folder where a data block keeps what it makes."""
    return (data.cache_dir if isinstance(data, Data) else None) or default_cache()


def survey(loader: MapLoader) -> tuple[str, np.ndarray]:
    """Return a hash of a loader's examples, and where the supervised tokens of each begin: int64 [examples + 1]."""
    digest, counts = hashlib.sha256(), [0]
    for index in range(len(loader.examples)):
        example = loader.examples[index]
        for ids, mask in example.documents:
            digest.update(len(ids).to_bytes(8, "big"))
            digest.update(np.ascontiguousarray(ids, dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(mask, dtype=bool).tobytes())
        for span in (span for spans in example.values.get(IMAGES, ()) for span in spans):
            digest.update(span["hash"].encode())  # two images of one size have the same tokens
        counts.append(sum(int(mask[1:].sum()) for _, mask in example.documents))
    return digest.hexdigest(), np.cumsum(counts)


def content_of(network: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers; all ranks must call it."""
    digest = hashlib.sha256()
    held: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in sorted(held.items()):
        content = gathered(tensor).cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded, whole."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach()
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()
