"""When a rank fails, its own error is what people read: the others, which lose their connections to it, say who failed.

The first rank to fail writes its name into the store through which the ranks found each other. A rank that fails later
finds it there, prints one line instead of its traceback, and waits to be ended by the launcher, so that launchers
blame the right one too.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PATIENCE = 10
"""Seconds for which a rank that failed because of another waits for the launcher, which looks ten times a second and
ends all ranks once one has ended: the one that speaks must not be ended before it has."""

_store: "Store | None" = None
_rank = _local_rank = 0


def report_failures(rank: int, local_rank: int) -> None:
    """From now on, report what ends this process as a failure of one rank among several."""
    global _store, _rank, _local_rank
    from torch.distributed.distributed_c10d import _get_default_store

    if _store is None:
        sys.excepthook = _uncaught
    _store, _rank, _local_rank = _get_default_store(), rank, local_rank


def store() -> "Store":
    """Return the store through which the ranks found each other."""
    assert _store is not None
    return _store


def key_of(name: str) -> str:
    """Return a key of this attempt's own: a store that outlives a restart must not show what the one before left."""
    return f"posttrain/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def is_first(error: BaseException) -> bool:
    """Take note that this rank failed, and return whether no other has before; if one has, say so and wait.

    Outside of a run of several ranks, every failure is the first.
    """
    if _store is None:
        return True
    mine = f"rank {_rank} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if lost_connection(error):  # to a rank that was killed, and so wrote nothing; its launcher knows
        mine = f"rank {_rank} lost its connection to another rank, which was killed or lost its machine"
    try:
        first = _store.compare_set(key_of("failed"), "", mine).decode()
    except RuntimeError:  # the store was in the process of rank zero
        first = "rank 0 ended"
    own = first == mine and not lost_connection(error)
    _record(first, "".join(traceback.format_exception(error)) if own else first)
    if own:
        return True
    if _local_rank == 0 or first == mine:
        said = first if first == mine else f"rank {_rank} ends, because {first}"
        print(said, file=sys.stderr, flush=True)  # noqa: T201
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(PATIENCE)
    return False


def is_to_speak(first_rank: bool) -> bool:
    """Return whether this rank prints an error that every rank finds, after the first rank had the time to.

    A machine whose ranks are still there then has an error of its own, such as a file that it alone lacks.
    """
    if first_rank:
        return True
    time.sleep(PATIENCE)
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def lost_connection(error: BaseException) -> bool:
    """Whether the error is that another rank went away: gloo says it in words, NCCL by its class."""
    return type(error).__name__ == "DistBackendError" or (isinstance(error, RuntimeError) and "by peer" in str(error))


def _record(message: str, callstack: str) -> None:
    """Write the error where torchrun looks for it, so that its own summary shows it (torch's `@record`)."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) or is_first(error):
        print(f"rank {_rank} failed:", file=sys.stderr)  # noqa: T201
        sys.__excepthook__(kind, error, trace)
