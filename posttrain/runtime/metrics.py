"""What steps log: kept on the device until the loggers are due, and the same however a step is cut."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from posttrain.batch import Batch, Term
from posttrain.errors import TrainingError
from posttrain.runtime.launch import all_reduce, gather_objects

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor


class Metrics:
    """Sums of the current step, kept on the device until the loggers are due.

    A value logged inside `loss` is a mean over what its micro-batch counts, so it is weighted by the
    micro-batch's share of the step and summed over micro-batches and ranks: cutting a step
    differently changes no logged value. A `Term` is a sum, and is divided by its own count over the
    whole step. A value logged elsewhere is taken as it is. Of several updates in one step, the mean is kept.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.totals: Mapping[str, float | Tensor] = {}
        self.values: dict[str, float | Tensor] = {}
        self.shared: dict[str, str] = {}
        """Name of each value that is summed over ranks -> what it is a mean over."""
        self.updates = 0
        self.steps: list[tuple[int, dict[str, float | Tensor]]] = []

    @contextmanager
    def counting(self, batch: Batch, totals: "Mapping[str, float | Tensor]") -> Iterator[Batch]:
        """Weight what is logged meanwhile by the batch's part of what the whole step counts.

        Yields the batch to compute on. One that counts nothing (a rank that ran out of rows in evaluation) gets the
        weight 1, so that dividing by it is harmless; its share is 0.
        """
        self.batch, self.totals = batch, totals
        try:
            yield batch if batch.weight else attrs.evolve(batch, weight=1)
        finally:
            self.batch = None

    def part(self, value: "float | Tensor | Term") -> "float | Tensor":
        """Return what a value of the batch in hand adds to that of the step.

        Raises:
            TrainingError: a term is a mean over something that the batch does not count.
        """
        assert self.batch is not None
        if not isinstance(value, Term):
            return value * (self.batch.weight / self.totals["weight"])
        counts = self.batch.counts
        if value.count not in counts:
            raise TrainingError(f"a term is a mean over {value.count!r}, which batches count not: {', '.join(counts)}")
        if not counts[value.count]:  # of which there may be none in the whole step
            return value.sum * 0.0
        return value.sum * (1.0 / self.totals[value.count])

    def add(self, values: "dict[str, float | Tensor | Term]") -> None:
        """Record values of the current step."""
        for name, value in values.items():
            if self.batch is None:
                self.values[name] = detached(value.sum if isinstance(value, Term) else value)
            else:
                self.shared[name] = value.count if isinstance(value, Term) else "weight"
                self.values[name] = self.values.get(name, 0.0) + detached(self.part(value))

    def end_step(self, step: int, **summed: "float | Tensor") -> None:
        """Close the current step; the given values are summed over ranks."""
        if self.updates > 1:
            means = {name: value / self.updates for name, value in self.values.items() if name in self.shared}
            self.values |= means
        self.shared |= dict.fromkeys(summed, "")
        self.steps.append((step, {**self.values, **summed}))
        self.values, self.updates = {}, 0

    def note(self, step: int, values: dict[str, float]) -> None:
        """Record values that are already reduced, with the step that has just been closed."""
        if not self.steps or self.steps[-1][0] != step:
            self.steps.append((step, {}))
        self.steps[-1][1].update(values)

    def take(self, fabric: "Fabric") -> list[tuple[int, dict[str, float]]]:
        """Return the closed steps as numbers: one transfer, and with several ranks one reduction."""
        steps, self.steps = self.steps, []
        flat = {(i, name): value for i, (_, values) in enumerate(steps) for name, value in values.items()}
        numbers = _numbers(flat, fabric)
        if fabric.world_size > 1:
            numbers |= _summed({k: v for k, v in flat.items() if k[1] in self.shared}, fabric)
        found: list[tuple[int, dict[str, float]]] = [(step, {}) for step, _ in steps]
        for (i, name), number in numbers.items():
            found[i][1][name] = number
        return found

    def averages(self, counts: dict[str, float], fabric: "Fabric") -> dict[str, float]:
        """Return the means of what was logged with totals of 1, over all ranks; other values as they are.

        Args:
            counts: what this rank's batches count.
            fabric: of the run.
        """
        alone = {(0, name): value for name, value in self.values.items() if name not in self.shared}
        sums: dict[tuple[int, str], float | Tensor] = {(0, name): self.values[name] for name in self.shared}
        sums |= {(1, name): count for name, count in counts.items()}
        numbers = _summed(sums, fabric) if fabric.world_size > 1 else _numbers(sums, fabric)
        means = {name: number for (_, name), number in _numbers(alone, fabric).items()}
        for name, count in self.shared.items():
            if total := numbers.get((1, count), 0.0):
                means[name] = numbers[0, name] / total
        return means


def detached(value: "float | Tensor") -> "float | Tensor":
    """Return a value that holds no graph."""
    return value if isinstance(value, int | float) else value.detach()


def _numbers(values: "dict[tuple[int, str], float | Tensor]", fabric: "Fabric") -> dict[tuple[int, str], float]:
    """Return plain numbers; all tensors come off the device together."""
    import torch

    on_device = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    numbers = {key: float(value) for key, value in values.items() if key not in on_device}
    if on_device:
        stacked = torch.stack([value.float().to(fabric.device) for value in on_device.values()])
        numbers |= dict(zip(on_device, stacked.tolist(), strict=True))
    return numbers


def _summed(values: "dict[tuple[int, str], float | Tensor]", fabric: "Fabric") -> dict[tuple[int, str], float]:
    """Return the sums over ranks; a rank that did not log a value adds nothing to it."""
    import torch

    mine = _numbers(values, fabric)
    known = sorted({tuple(key) for rank in gather_objects(fabric, sorted(mine)) for key in rank})
    stacked = torch.tensor([mine.get(key, 0.0) for key in known], dtype=torch.float64, device=fabric.device)
    return dict(zip(known, all_reduce(fabric, stacked).tolist(), strict=True))
