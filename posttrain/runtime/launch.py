"""One `Fabric`, however the process was started: plainly, by `fabric run`, `torchrun` or `srun`.

A recipe that asks for several devices of this machine is started again by `torch.distributed.run`: one agent watches
the ranks, hands signals on to them, and ends them all when one fails.
"""

import atexit
import hashlib
import logging
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import RecipeError
from posttrain.runtime.failures import report_failures
from posttrain.runtime.precision import keep_buffers

log = logging.getLogger(__name__)

SECONDS_TO_SAVE = 600
"""How long the ranks may take to finish a step and save after a signal, before they are killed."""

GLOO = "Name:\tpt_gloo"
"""How the kernel's account of a thread begins that does gloo's work."""

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import Tensor


def make_fabric(
    *, accelerator: str, devices: int | str, num_nodes: int, precision: str | None, strategy: Any
) -> "Fabric":
    """Return a launched Fabric.

    A device count of `auto` means what the launcher says: `fabric run --devices`, `torchrun
    --nproc-per-node`; without a launcher it means every GPU there is, or one CPU process.

    Raises:
        RecipeError: the recipe and the launcher ask for different things.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    asked = {"accelerator": accelerator, "devices": devices, "strategy": strategy, "precision": precision}
    if num_nodes != 1:
        asked["num_nodes"] = num_nodes
    asked = {name: value for name, value in asked.items() if value not in ("auto", None)}
    by_fabric_run = bool(int(os.environ.get("LT_CLI_USED", "0")))
    if by_fabric_run:
        _drop_what_the_launcher_set(asked)
    elif TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        _agree(asked, "torchrun", devices=local, num_nodes=int(os.environ["WORLD_SIZE"]) // local)
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ["RANK"] == "0":
            _warn_of_shared_store()
    elif (tasks := slurm_tasks()) > 1:
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        _agree(asked, "srun", devices=tasks // nodes, num_nodes=nodes)
    elif num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise RecipeError(
            f"num_nodes: {num_nodes} machines need a launcher on each of them, and this process has none: use "
            "`torchrun --nnodes ... posttrain/cli.py train recipe.yaml` or srun (examples/slurm)"
        )
    elif "devices" not in asked and _on_cpu(accelerator):
        asked["devices"] = 1
    if "LT_PRECISION" not in os.environ:
        asked.setdefault("precision", "32-true" if _on_cpu(accelerator) else "bf16-mixed")
    silence_libraries()
    try:
        fabric = Fabric(**asked)
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise RecipeError(f"accelerator, devices, precision and strategy do not go together: {error}") from error
    except RuntimeError as error:  # how Fabric says that there is no such device
        raise RecipeError(
            f"accelerator: {accelerator} was asked for, but this machine has none that torch can use; "
            f"`posttrain doctor` says what there is ({str(error).splitlines()[0]})"
        ) from error
    if not by_fabric_run:
        fabric.launch()
    keep_buffers(fabric)
    if fabric.world_size > 1:
        atexit.register(_leave)
        report_failures(fabric.global_rank, fabric.local_rank)
    return fabric


def silence_libraries() -> None:
    """Keep libraries from announcing what is no news: each rank would, some of them twice."""
    import torch

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    hush()
    if not torch.accelerator.is_available():  # DeepSpeed would look for one, and warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def hush() -> None:
    """Keep libraries that transformers and peft import from telling of kernels for other machines."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def slurm_tasks() -> int:
    """Return how many processes `srun` started for this job step; 1 outside of SLURM, and in its interactive jobs.

    Raises:
        RecipeError: there are several tasks, but this process is none of them.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks > 1 and os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return 1
    if tasks > 1 and "SLURM_STEP_ID" not in os.environ:
        raise RecipeError(
            f"this job of SLURM has {tasks} tasks, but the process was not started by srun, so that the others would "
            "be waited for in vain; write `srun posttrain train ...`, or see examples/slurm for torchrun"
        )
    return tasks


def ranks_to_start(accelerator: str, devices: int | str, num_nodes: int) -> int:
    """Return how many ranks `posttrain train` must start on this machine; 1 under a launcher, which has done it."""
    launched = any(name in os.environ for name in ("LT_CLI_USED", "TORCHELASTIC_RUN_ID", "MASTER_ADDR"))
    if launched or num_nodes > 1 or slurm_tasks() > 1:
        return 1
    if str(devices).isdecimal():
        return int(devices)
    if devices not in ("auto", "-1", -1) or _on_cpu(accelerator) or accelerator == "mps":
        return 1  # a list of GPUs, such as "0,2", is Fabric's to understand
    import torch

    return torch.cuda.device_count()


def relaunch(ranks: int, script: Path | Literal["-m"], arguments: list[str]) -> int:
    """Run a script, or a module, in so many processes of this machine, and return an exit code when all have ended.

    A signal is handed on to the ranks, which finish their step and save; a second one ends them at once.
    """
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    run: Any = torch.distributed.run
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report failures themselves
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={ranks}", str(script), *arguments]))
    except SignalException as caught:
        return 128 + int(caught.sigval)
    except ChildFailedError as failed:
        ended = -signal.SIGTERM  # how the launcher ends the others, often in the same second
        rank, first = min(failed.failures.items(), key=lambda item: (item[1].exitcode == ended, item[1].timestamp))
        if first.exitcode < 0:
            why = f"rank {rank} was killed by {signal.Signals(-first.exitcode).name}"
            print(f"error: {why}; the same command goes on from the last checkpoint", file=sys.stderr)  # noqa: T201
            return 128 - first.exitcode
        return int(first.exitcode)
    return 0


def _leave() -> None:
    """Close the connections to the other ranks before the interpreter goes; gloo aborts if they break later."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    _settle()


def _settle(seconds: float = 10.0) -> None:
    """Wait until gloo's threads are idle, while Python still runs.

    They outlive the group, as DDP does not let go of it. One that is late, on a loaded machine, drops the last tensor
    of a collective that is long done, for which it needs the interpreter. If that is about to end by then, it ends the
    thread instead, in the middle of a destructor of C++: `terminate called without an active exception`, SIGABRT.
    """
    tasks, end = Path("/proc/self/task"), time.monotonic() + seconds
    if not tasks.is_dir():  # not Linux
        return time.sleep(0.2)
    before: dict[str, str] | None = None
    while time.monotonic() < end:
        now = {task.name: _state(task) for task in tasks.iterdir()}
        now = {task: state for task, state in now.items() if state.startswith(GLOO)}
        if now == before and all("State:\tS" in state for state in now.values()):
            return None
        before = now
        time.sleep(0.005)  # others can have the interpreter meanwhile
    return None


def _state(task: Path) -> str:
    """Return what the kernel says of a thread: its name, whether it sleeps, how often it has begun to."""
    with suppress(OSError):  # it has ended
        return (task / "status").read_text()
    return ""


def _agree(asked: dict[str, Any], launcher: str, **started: int) -> None:
    """Take what the launcher started; the recipe must not say otherwise."""
    for name, value in started.items():
        if str(asked.setdefault(name, value)) != str(value):
            raise RecipeError(f"{name}: the recipe says {asked[name]}, but {launcher} started {value}")


def _warn_of_shared_store() -> None:
    """Ranks that start over mostly fail to find each other in a store that the agent kept (pytorch issue 135712)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        log.warning("torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or restarts may not connect")


def _drop_what_the_launcher_set(asked: dict[str, Any]) -> None:
    for name in list(asked):
        given = os.environ.get(f"LT_{name.upper()}")
        if given is None:
            continue
        if str(asked[name]) != given:
            raise RecipeError(
                f"{name}: the recipe says {asked[name]!r}, but `fabric run` was given "
                f"--{name.replace('_', '-')}={given}; leave one of them out"
            )
        del asked[name]


def _on_cpu(accelerator: str) -> bool:
    if accelerator != "auto":
        return accelerator == "cpu"
    import torch

    return os.environ.get("LT_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def all_reduce(fabric: "Fabric", tensor: "Tensor", op: str = "SUM") -> "Tensor":
    """Reduce a tensor over all ranks, in place; on GPUs the host does not wait for it.

    Fabric's own `all_reduce` puts a barrier in front, which does wait.
    """
    if fabric.world_size > 1:
        import torch.distributed

        torch.distributed.all_reduce(tensor, op=getattr(torch.distributed.ReduceOp, op))
    return tensor


def on_device(fabric: "Fabric", numbers: list[float]) -> "Tensor":
    """Return numbers on the device, float32 [n]; a GPU takes them when it comes to it, and the host does not wait."""
    import torch

    if fabric.device.type != "cuda":
        return torch.tensor(numbers, device=fabric.device)
    return torch.tensor(numbers, pin_memory=True).to(fabric.device, non_blocking=True)


class Later:
    """A number of the device that the host reads later: it waits for what was queued before it, and for no more."""

    def __init__(self, number: "Tensor") -> None:
        import torch

        self.copy, self.event = number, None
        if number.is_cuda:
            self.copy = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self.copy.copy_(number, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()

    def read(self) -> float:
        """Return the number."""
        if self.event is not None:
            self.event.synchronize()
        return float(self.copy)


def gather_rows(fabric: "Fabric", tensor: "Tensor") -> "list[Tensor]":
    """Return every rank's rows of a tensor [n, ...]; n may differ between ranks."""
    if fabric.world_size == 1:
        return [tensor]
    import torch
    from torch.distributed import all_gather

    count = torch.tensor(len(tensor), device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(fabric.world_size)]
    all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in sizes]
    all_gather(gathered, padded)
    return [rows[:size] for rows, size in zip(gathered, sizes, strict=True)]


def gather_objects(fabric: "Fabric", value: Any) -> list[Any]:
    """Return every rank's value."""
    if fabric.world_size == 1:
        return [value]
    from torch.distributed import all_gather_object

    found: list[Any] = [None] * fabric.world_size
    all_gather_object(found, value)
    return found


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed every generator from (seed, step, rank), so that a resumed run draws what an uninterrupted one would."""
    import numpy as np
    import torch

    mixed = int.from_bytes(hashlib.blake2b(f"{seed},{step},{rank}".encode(), digest_size=8).digest(), "big")
    torch.manual_seed(mixed % 2**63)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)
