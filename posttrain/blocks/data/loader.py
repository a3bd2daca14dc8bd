"""Loaders: examples in, micro-batches for one rank out, in an order that any number of ranks shares.

A row holds one example, or as many as fit (packing). The rows of all ranks form one sequence,
pass after pass; a micro-batch takes the next `micro_batch_size` rows for each rank. Nothing is
dropped: where a pass does not fill the last step, the next pass goes on in the middle of it.
"""

import copy
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs

from posttrain.batch import Batch, Extra
from posttrain.blocks.data.packing import chunks, plan
from posttrain.blocks.layout import Example, collate
from posttrain.errors import DataError
from posttrain.interfaces import Position

if TYPE_CHECKING:
    import numpy as np

S = TypeVar("S")
T = TypeVar("T")


class Examples(Protocol):
    """Tokenized examples at rest (see store.py)."""

    @property
    def lengths(self) -> "np.ndarray":
        """[examples], in tokens."""

    @property
    def source(self) -> "np.ndarray":
        """[examples], the number of the source."""

    @property
    def weights(self) -> list[float]:
        """[sources], how often a pass sees each row."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class More(Protocol):
    """What batches get beside what their examples carry, such as what a teacher said of them (see recorded.py)."""

    def of(self, indices: list[int]) -> dict[str, Extra]:
        """Return it for the examples of a batch, in the order of its rows."""


class Stream(Protocol):
    """Raw rows in their own order, with a state from which reading can go on (see sources.py)."""

    def read(self, epoch: int, state: dict[str, Any] | None) -> Iterator[tuple[Any, int, dict[str, Any]]]:
        """Yield one pass: each row with the number of its source, and the state after it."""


@attrs.frozen(kw_only=True, slots=False)
class RowLoader:
    """What both loaders share: cutting a sequence of rows into micro-batches."""

    max_length: int
    packing: bool
    micro_batch_size: int
    rank: int
    world_size: int
    seed: int
    collate: Callable[[list[list[Example]], int], Batch] = collate
    """Makes rows of examples, and what the width is a multiple of, a batch."""
    multiple: int = 1
    """What the width of a batch is a multiple of."""
    ahead: int = 0
    """Threads that read and collate the next micro-batches while others are trained on."""

    def sequence(self, position: Position) -> Iterator[tuple[Any, Position]]:
        """Yield the rows of all ranks from a position on, each with the position after it."""
        raise NotImplementedError

    def first_pass(self) -> Iterator[Any]:
        """Yield the rows of all ranks in the first pass."""
        raise NotImplementedError

    def batch(self, rows: list[Any]) -> Batch:
        """Return the micro-batch of some rows that `sequence` gave."""
        raise NotImplementedError

    def start(self) -> Position:
        """Return the position before the first row."""
        return {"epoch": 0, "row": 0}

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yield micro-batches without end, each with the position after it."""
        size = self.micro_batch_size * self.world_size
        groups = (group for group in chunks(self.sequence(position), size) if len(group) == size)
        return in_order(lambda group: (self._mine([row for row, _ in group]), group[-1][1]), groups, self.ahead)

    def one_pass(self) -> Iterator[Batch]:
        """Yield each row of one pass once, as equally many micro-batches on every rank."""
        groups = chunks(self.first_pass(), self.micro_batch_size * self.world_size)
        return in_order(self._mine, groups, self.ahead)

    def arranged(self, order: "np.ndarray", lengths: "np.ndarray", random: "np.random.Generator") -> list[list[int]]:
        """Return the examples of each row, in training order; rows that are packed are shuffled again."""
        if not self.packing:
            return [[i] for i in order.tolist()]
        rows = plan(order, lengths, self.max_length)
        return [rows[i] for i in random.permutation(len(rows)).tolist()]

    def _mine(self, group: list[Any]) -> Batch:
        """Collate this rank's part of a group; where a short group leaves it nothing, a row that counts nothing."""
        first = self.rank * self.micro_batch_size
        if rows := group[first : first + self.micro_batch_size]:
            return self.batch(rows)
        return self.batch(group[:1]).idle()


@attrs.frozen(kw_only=True, slots=False)
class MapLoader(RowLoader):
    """Examples at rest, in a random order that is a function of (seed, epoch)."""

    examples: Examples
    extra: More | None = None
    _plans: dict[int, list[list[int]]] = attrs.field(factory=dict, init=False, eq=False)

    def rows(self, epochs: int) -> int | None:
        """Return how many rows `epochs` passes hold."""
        return sum(len(self.plan(epoch)) for epoch in reversed(range(epochs)))  # the first pass stays planned

    def plan(self, epoch: int) -> list[list[int]]:
        """Return the examples of each row of a pass, in training order."""
        if epoch not in self._plans:
            import numpy as np

            random = np.random.default_rng([self.seed, epoch])
            rows = self.arranged(random.permutation(self._drawn(random)), self.examples.lengths, random)
            self._plans.clear()  # one pass at a time is enough
            self._plans[epoch] = rows
        return self._plans[epoch]

    def fill(self) -> float:
        """Return the share of the first pass's rows that is not padding."""
        rows = self.plan(0)
        lengths = self.examples.lengths
        capacity = len(rows) * self.max_length
        return float(sum(int(lengths[i]) for row in rows for i in row) / capacity) if capacity else 0.0

    def sequence(self, position: Position) -> Iterator[tuple[list[int], Position]]:
        """Yield rows as lists of indices of examples."""
        epoch, first = position["epoch"], position["row"]
        while rows := self.plan(epoch):
            for i in range(first, len(rows)):
                yield rows[i], {"epoch": epoch, "row": i + 1} if i + 1 < len(rows) else {"epoch": epoch + 1, "row": 0}
            epoch, first = epoch + 1, 0

    def first_pass(self) -> Iterator[list[int]]:
        """Yield the rows of the first pass."""
        return iter(self.plan(0))

    def batch(self, rows: list[list[int]]) -> Batch:
        """Read the examples of some rows, and collate them."""
        made = self.collate([[self.examples[index] for index in row] for row in rows], self.multiple)
        return made if self.extra is None else made.but(**self.extra.of([index for row in rows for index in row]))

    def _drawn(self, random: "np.random.Generator") -> "np.ndarray":
        """Return the indices of a pass: a source of weight 2.5 twice, and a random half of it a third time."""
        import numpy as np

        weights = self.examples.weights
        if all(weight == 1.0 for weight in weights):
            return np.arange(len(self.examples))
        parts = []
        for number, weight in enumerate(weights):
            members = np.flatnonzero(self.examples.source == number)
            extra = random.permutation(members)[: round(len(members) * (weight % 1))]
            parts += [members] * int(weight) + [extra]
        return np.concatenate(parts)


@attrs.frozen(kw_only=True, slots=False)
class StreamLoader(RowLoader):
    """Rows that are read and tokenized as training goes: shuffled and packed within windows of raw rows.

    A window is a function of where reading began, so a position is that place and a row in the window:
    going on after a crash reads at most one window again.
    """

    stream: Stream
    encode: Callable[[list[tuple[Any, int]], dict[str, Any]], list[Example]]
    """Makes examples of rows, and counts in a ledger what became of them."""
    window: int
    ledger: dict[str, Any] = attrs.field(factory=dict)
    """Of all windows that were trained on, the one in hand included."""

    def start(self) -> Position:
        """Return the position before the first row."""
        return {"epoch": 0, "row": 0, "window": 0, "state": None, "ledger": {}}

    def rows(self, epochs: int) -> int | None:
        """Return None: only reading it tells how long a stream is."""
        return None

    def sequence(self, position: Position) -> Iterator[tuple[list[Example], Position]]:
        """Yield rows as lists of examples; the next window is made while this one is trained on."""
        for rows, before, after in ahead(self._windows(position)):
            self._account(after)
            for i in range(before["row"], len(rows)):
                yield rows[i], {**before, "row": i + 1} if i + 1 < len(rows) else after

    def first_pass(self) -> Iterator[list[Example]]:
        """Yield the rows of the first pass."""
        for rows, before, after in self._windows(self.start()):
            if before["epoch"] > 0:
                return
            self._account(after)
            yield from rows

    def batch(self, rows: list[list[Example]]) -> Batch:
        """Collate some rows, which are in memory."""
        return self.collate(rows, self.multiple)

    def _windows(self, position: Position) -> Iterator[tuple[list[list[Example]], Position, Position]]:
        before, found = position, True
        while found:
            epoch, found = before["epoch"], before["state"] is not None
            for raw in chunks(self.stream.read(epoch, before["state"]), self.window):
                ledger = copy.deepcopy(before.get("ledger", {}))  # checkpoints of earlier versions have none
                found_here = self.encode([(row, source) for row, source, _ in raw], ledger)
                rows = self._packed(found_here, epoch, before["window"])
                after = {
                    "epoch": epoch, "row": 0, "window": before["window"] + 1, "state": raw[-1][2], "ledger": ledger,
                }  # fmt: skip
                found = found or bool(rows)
                yield rows, before, after
                before = after
            before = {**before, "epoch": epoch + 1, "row": 0, "window": 0, "state": None}
        raise DataError("a whole pass over the stream gave no row that can be trained on; see the ledger for reasons")

    def _account(self, after: Position) -> None:
        """Let the ledger say what became of all rows before a position."""
        self.ledger.clear()
        self.ledger.update(after["ledger"])

    def _packed(self, examples: list[Example], epoch: int, window: int) -> list[list[Example]]:
        import numpy as np

        random = np.random.default_rng([self.seed, epoch, window])
        lengths = np.array([len(example) for example in examples], dtype=np.int64)
        rows = self.arranged(random.permutation(len(examples)), lengths, random)
        return [[examples[i] for i in row] for row in rows]


def in_order(work: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """Yield `work(item)` of each item, in their order; with threads, the next ones are made meanwhile."""
    if not threads:
        yield from map(work, items)
        return
    pool, made = ThreadPoolExecutor(threads, thread_name_prefix="posttrain-batches"), deque[Future[T]]()
    try:
        for item in items:
            made.append(pool.submit(work, item))
            if len(made) > 2 * threads:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items, making the next one in a thread meanwhile."""
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(entry: "tuple[T | None, BaseException | None]") -> None:
        while not closed.is_set():
            try:
                return made.put(entry, timeout=0.1)
            except queue.Full:
                continue
        return None

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=work, daemon=True, name="posttrain-ahead").start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
