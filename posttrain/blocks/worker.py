"""Worker processes that encode rows: `python -m posttrain.blocks.worker` with pickles through pipes.

A plain subprocess, not multiprocessing: the user's script is not imported again (it needs no
`if __name__ == "__main__"`), and a worker ends by itself when its parent is gone, because its input ends.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from posttrain.errors import DataError

Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def workers(encode: Callable[[Any], Any], count: int) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """Start processes and give a function that maps batches through them, in order.

    Raises:
        DataError: a process ended before its work was done.
        pickle.PicklingError: the encoder cannot be sent to another process.
    """
    job = pickle.dumps((sys.path, pickle.dumps(encode)))
    # Each process has one batch at a time; more threads inside would only compete with its siblings.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "posttrain.blocks.worker"]
    path = os.pathsep.join(p for p in sys.path if p)
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment | {"PYTHONPATH": path}
        )
        for _ in range(count)
    ]
    threads = ThreadPoolExecutor(count)
    idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
    try:
        for process in processes:
            with contextlib.suppress(BrokenPipeError):
                _pipes(process)[0].write(job)
            idle.put(process)
        yield lambda batches: _in_order(batches, lambda b: threads.submit(_ask, idle, b), 2 * count)
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            for pipe in _pipes(process):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            process.wait()


def _in_order(batches: Iterable[Any], submit: Callable[[Any], Future[Any]], most: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for batch in batches:
        waiting.append(submit(batch))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _ask(idle: "queue.SimpleQueue[Process]", batch: Any) -> Any:
    process = idle.get()
    to, back = _pipes(process)
    try:
        pickle.dump(batch, to)
        to.flush()
        result, error = pickle.load(back)
    except (BrokenPipeError, EOFError, pickle.UnpicklingError):
        raise DataError(
            f"a tokenization process ended early (exit status {process.wait()}; killed for memory?); "
            "`data.workers: 1` works without such processes"
        ) from None
    finally:
        idle.put(process)
    if error is not None:
        raise error
    return result


def _pipes(process: Process) -> tuple[Any, Any]:
    return process.stdin, process.stdout


def main() -> None:
    """Answer each pickled batch on stdin with (result, error) on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what user code prints must not get among the results
    path, encoder = pickle.load(incoming)
    sys.path[:] = path
    encode = pickle.loads(encoder)
    while True:
        try:
            batch = pickle.load(incoming)
        except EOFError:
            return
        try:
            answer = pickle.dumps((encode(batch), None))
        except Exception as error:
            answer = pickle.dumps((None, error if isinstance(error, DataError) else DataError(repr(error))))
        outgoing.write(answer)
        outgoing.flush()


if __name__ == "__main__":
    main()
