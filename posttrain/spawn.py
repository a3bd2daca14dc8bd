"""`posttrain train` on several devices of one machine: a process for each, and one error if they fail.

torch's elastic agent (what torchrun is made of) starts and watches them. Ranks write their errors to files instead of
the terminal, so that what is shown is the error of the rank that failed first, and not what others say of losing it.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import errors
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.trainer import Trainer

MARK = "POSTTRAIN_SPAWNED"
PATIENCE = "3600"
"""Seconds that ranks may take to save when a signal ends the run, before they are killed."""


def wanted(trainer: "Trainer") -> int:
    """Return how many processes this command must start; 0 if a launcher did, or one is enough.

    Raises:
        RecipeError: it takes a launcher to start them.
    """
    if {"RANK", "LOCAL_RANK", "LT_CLI_USED"} & os.environ.keys():
        return 0
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 or trainer.num_nodes > 1:
        raise RecipeError(
            "num_nodes: each node must run `torchrun --nnodes=N --nproc-per-node=M --rdzv-backend=c10d "
            "--rdzv-endpoint=FIRST_NODE:29400 -m posttrain.cli train ...`; examples/slurm shows it under SLURM"
        )
    devices = trainer.devices
    if devices == "auto" and trainer.accelerator != "cpu":
        import torch

        devices = torch.cuda.device_count()
    count = int(devices) if str(devices).isdecimal() else 1
    return count if count > 1 else 0


def spawn(argv: list[str], processes: int, restarts: int) -> int:
    """Run this command in so many processes, and return its exit code.

    Args:
        argv: of this command.
        processes: on this machine.
        restarts: how often all of them are started again when one dies; they go on from the newest checkpoint.
    """
    os.environ |= {MARK: "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a shared store breaks restarts
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", PATIENCE)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.1, logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "posttrain.cli", *argv)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=order)
        print(said(rank, failure), file=sys.stderr)  # noqa: T201
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def record(error: BaseException) -> bool:
    """Keep an error for the process that started this one; whether there is one, which will show it."""
    if MARK not in os.environ:
        return False
    now, stack = time.time_ns(), "".join(traceback.format_exception(error))
    about = {"py_callstack": stack, "timestamp": str(now // 10**9), "nanoseconds": now}
    said = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": about}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(said))  # the format of the agent
    return True


def order(found: tuple[int, Any]) -> tuple[bool, int]:
    """Return what sorts failures: who was killed before who raised, and who raised first before who lost it then."""
    _, failure = found
    killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # the agent sends that to the others
    return not killed, message_of(failure).get("extraInfo", {}).get("nanoseconds", sys.maxsize)


def message_of(failure: Any) -> dict[str, Any]:
    """Return what a rank wrote of its failure; nothing if it could not."""
    try:
        found: dict[str, Any] = json.loads(Path(failure.error_file).read_text())["message"]
    except (OSError, ValueError, KeyError):
        return {}
    return found


def said(rank: int, failure: Any) -> str:
    """Return what to show of the first failure: our own errors as a message, others with where they were raised."""
    if failure.exitcode < 0:
        return f"error: rank {rank} was ended by {failure.signal_name()}; the others were stopped"
    if not (found := message_of(failure)):
        return f"error: rank {rank} ended with exit code {failure.exitcode}"
    name, _, message = found["message"].partition(": ")
    if isinstance(getattr(errors, name, None), type):
        return f"error: {message}"
    return f"{found['extraInfo']['py_callstack'].rstrip()}\nerror: rank {rank} failed first: {found['message']}"
