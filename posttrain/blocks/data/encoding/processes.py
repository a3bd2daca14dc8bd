"""Encoding over the cores of a machine: batches of rows go to processes, and come back in their order.

So a table is the same to the last byte, however many processes made it. Rendering a chat template is Python, which
threads do not speed up.
"""

import logging
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from posttrain.blocks.data.encoding.encoders import Encoded, Encoder
from posttrain.blocks.data.readers import Row
from posttrain.blocks.data.rows.schemas import Reading
from posttrain.errors import DataError

PATIENCE = 4.0
"""Seconds of encoding after which starting processes (two or three seconds of work for each) is worth it."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
log = logging.getLogger("posttrain")
Batch: TypeAlias = tuple[list[Row], list[Encoded]]


def encoded(encoder: Encoder, batches: Iterator[list[Row]], processes: int | None) -> Iterator[Batch]:
    """Yield batches of rows with what they became.

    The first batch is always encoded here: a source that does not fit is noticed before anything is started.

    Args:
        encoder: what encodes; at the end its `reading` tells of all rows.
        batches: of rows.
        processes: how many encode; None for one a core, once the first seconds have shown that there is much to do.

    Raises:
        DataError: what `encoder.encode` raises; a process died; or `processes` is given, and the encoder's class
            cannot be had in another process.
    """
    count = cores() if processes is None else processes
    began = time.monotonic()
    for batch in batches:
        yield batch, encoder.encode([row.values for row in batch])
        if count > 1 and (processes is not None or time.monotonic() - began > PATIENCE):
            break
    else:
        return
    with ExitStack() as stack:
        threads = ThreadPoolExecutor(count, "posttrain-encode")
        stack.callback(threads.shutdown, cancel_futures=True)
        workers = started(encoder, count, stack, must=processes is not None)
        if workers:
            yield from spread(workers, threads, batches)
            for worker in workers:
                encoder.reading.add(worker.reading)
    for batch in batches:  # there are none left, or this process is alone
        yield batch, encoder.encode([row.values for row in batch])


def cores() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


class Worker:
    """A process that encodes."""

    def __init__(self, packed: bytes) -> None:
        self.reading = Reading()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | ONE_THREAD,
        )  # fmt: skip
        self._send(sys.path)
        self._send(packed)

    def encode(self, rows: list[dict[str, Any]]) -> list[Encoded]:
        """Return what rows became."""
        self._send(rows)
        found, self.reading = self.answer()
        return list(found)

    def answer(self) -> Any:
        """Return what the process says next.

        Raises:
            DataError: it has ended.
        """
        assert self.process.stdout is not None
        try:
            said = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._ended() from None
        if isinstance(said, Exception):
            raise said
        return said

    def close(self) -> None:
        """End the process, also while a thread waits for its answer."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not sent
                pipe.close()

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            pickle.dump(value, self.process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _ended(self) -> DataError:
        code = self.process.wait()
        how = f"was killed by signal {-code} (9: often for lack of memory)" if code < 0 else f"ended with status {code}"
        return DataError(f"a process that tokenizes {how}; set data.num_proc to a lower number, or to 1")


def started(encoder: Encoder, count: int, stack: ExitStack, must: bool) -> list[Worker]:
    """Return processes that hold the encoder; none if it cannot be had in another process and need not.

    Raises:
        DataError: it cannot, and must.
    """
    try:
        packed = pickle.dumps(encoder, protocol=pickle.HIGHEST_PROTOCOL)
        workers = []
        for _ in range(count):
            workers.append(Worker(packed))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.answer()
    except DataError:
        raise
    except Exception as error:  # pickle raises what it likes
        why = f"what reads the rows cannot be had in another process ({type(error).__name__}: {error})"
        if must:
            advice = "put its class into a file that the recipe names as `code:`, or set data.num_proc to 1"
            raise DataError(f"{why}; {advice}") from None
        log.info("tokenizing in one process: %s", why)
        return []
    log.info("tokenizing in %d processes", count)
    return workers


def spread(workers: list[Worker], threads: ThreadPoolExecutor, batches: Iterator[list[Row]]) -> Iterator[Batch]:
    """Yield batches with what they became, in their order; two for each worker are under way."""
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def ask(batch: list[Row]) -> Batch:
        worker = free.get()
        try:
            return batch, worker.encode([row.values for row in batch])
        finally:
            free.put(worker)

    under_way: deque[Future[Batch]] = deque()
    for batch in batches:
        under_way.append(threads.submit(ask, batch))
        if len(under_way) == 2 * len(workers):
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
