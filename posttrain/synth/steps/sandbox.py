"""Python that models wrote, run so that it can harm nothing: no network, files or processes, bounded time and memory.

It is a process of its own that locks itself in (`jail`); it reads the interpreter and its packages, and nothing else.
What no sandbox sees: an answer whose code deceives the tests that run beside it in the process, such as by an `__eq__`
that is always true. Tests of inputs and outputs are compared outside of it, and cannot be deceived.
"""

import ctypes
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import attrs

from posttrain.errors import SynthError
from posttrain.synth.steps import jail

NOT_HERE = "code cannot be run in a sandbox here"
OUTPUT_KB = 1024
"""Of what a program prints."""
LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")


@attrs.frozen
class Ran:
    """What a program came to."""

    ended: bool
    """It ran to its end, and raised nothing."""
    out: str
    """What it printed."""
    error: str
    """Why it did not end: `timeout`, or the last line of its traceback."""


def run(*parts: tuple[str, str], stdin: str = "", seconds: int = 10, memory_mb: int = 1024) -> Ran:
    """Run sources one after the other in one namespace.

    Args:
        parts: (name for tracebacks, source) of each.
        stdin: what the program reads.
        seconds: of wall-clock time, and of processor time.
        memory_mb: address space of the process.

    Raises:
        SynthError: the process could not be locked in; nothing was run.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder, _pipes() as (asked, said):
        program = Path(folder) / "program.json"
        program.write_text(json.dumps(parts), encoding="utf-8")
        os.write(asked[1], word.encode())
        limits = {
            "seconds": seconds, "memory_mb": memory_mb, "output_kb": OUTPUT_KB, "readable": _readable(),
            "word": asked[0], "said": said[1],
        }  # fmt: skip
        command = [sys.executable, "-s", "-P", jail.__file__, json.dumps(limits), str(program)]
        with open(Path(folder) / "out", "w+b") as out, open(Path(folder) / "error", "w+b") as error:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=error, cwd=folder, env=_environment(),
                pass_fds=(asked[0], said[1]), start_new_session=True,
            )  # fmt: skip
            late = _finish(child, stdin, seconds)
            out.seek(0)
            error.seek(0)
            printed, told = (file.read().decode("utf-8", "replace") for file in (out, error))
        os.set_blocking(said[0], False)
        try:
            heard = os.read(said[0], 256)
        except BlockingIOError:
            heard = b""
    ended = heard == jail.LOCKED + word.encode() and child.returncode == 0
    if not heard and not late:
        raise SynthError(f"{NOT_HERE}: {(told.strip() or 'Python did not start').splitlines()[-1]}. Nothing was run")
    last = told.strip().splitlines()[-1] if told.strip() else f"ended early (code {child.returncode})"
    return Ran(ended, printed, "" if ended else "timeout" if late else last)


@cache
def unavailable() -> str | None:
    """Return why code cannot be run here; None if it can. Starts no process."""
    if sys.platform != "linux":
        return f"{NOT_HERE}: it needs Linux, and this is {sys.platform}; run the step in a container"
    if platform.machine() not in jail.MACHINES:
        return f"{NOT_HERE}: there is no list of system calls for {platform.machine()}"
    if ctypes.CDLL(None).syscall(jail.CREATE_RULESET, 0, 0, 1) < 1:
        return f"{NOT_HERE}: this kernel has no Landlock (Linux 5.13 or later, with `landlock` among its `lsm`)"
    return None


def _finish(child: "subprocess.Popen[bytes]", stdin: str, seconds: int) -> bool:
    """Wait for a process, and end it when its time is up; return whether it was."""
    try:
        child.communicate(stdin.encode("utf-8", "replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    return child.returncode == -signal.SIGXCPU


class _pipes:
    """Two pipes, each (end to read, end to write)."""

    def __enter__(self) -> tuple[tuple[int, int], tuple[int, int]]:
        self._ends = (os.pipe(), os.pipe())
        return self._ends

    def __exit__(self, *exception: object) -> None:
        for pair in self._ends:
            for end in pair:
                os.close(end)


def _readable() -> list[str]:
    """Return the folders of the interpreter and its packages."""
    paths = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *LIBRARIES}
    # A prefix such as /usr holds more than Python, but nothing of the user's.
    return sorted(path for path in paths if path and path != "/")


def _environment() -> dict[str, str]:
    """Return an environment that holds no keys, and makes a run the same each time."""
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
