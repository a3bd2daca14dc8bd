"""A server that runs as long as what asks it. If it ends by itself, what asks it ends at once, too, and says why."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

LINES = 15
"""Of the log, that are shown."""


@contextlib.contextmanager
def served(command: list[str], health: str, log: Path, seconds: float = 300, **environment: str) -> Iterator[None]:
    """Run a server while the block runs, which begins when the server answers at `health`.

    Raises:
        SystemExit: it has ended by itself, or does not answer in time; with the last lines of its log.
    """
    with open(log, "w") as out:
        server = subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out)
    over = threading.Event()
    try:
        wait_for(server, health, seconds)
        threading.Thread(target=watch, args=(server, over), daemon=True).start()
        yield
    except BaseException as error:  # Ctrl-C of `watch` among them, and the exit code of a command that it has ended
        with contextlib.suppress(subprocess.TimeoutExpired):  # its connections end a moment before it does
            server.wait(0.5)
        if server.poll() is None and not isinstance(error, TimeoutError):
            raise
        name = " ".join([Path(command[0]).name, *command[1:2]])
        sys.exit(f"`{name}` {fate(server, error)}. The last lines of {log}:\n{tail(log)}")
    finally:
        over.set()
        server.terminate()
        server.wait()


def wait_for(server: "subprocess.Popen[bytes]", health: str, seconds: float) -> None:
    """Return when a server answers.

    Raises:
        TimeoutError: it does not.
        ChildProcessError: it has ended.
    """
    deadline = time.monotonic() + seconds
    while server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"does not answer at {health} after {seconds:g} s")
        time.sleep(0.1)
    raise ChildProcessError


def watch(server: "subprocess.Popen[bytes]", over: threading.Event) -> None:
    """Interrupt the main thread, as Ctrl-C does, when a server ends before it should."""
    server.wait()
    if not over.is_set():
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def fate(server: "subprocess.Popen[bytes]", error: BaseException) -> str:
    """Say what became of a server."""
    code = server.poll()
    if code is None:
        return str(error)
    how = f"exit code {code}" if code >= 0 else f"{signal.Signals(-code).name} from outside"
    how += " (the system sends it when memory runs out)" if code == -signal.SIGKILL else ""
    if isinstance(error, ChildProcessError):
        return f"has ended before it could be asked: {how}"
    return f"has ended by itself: {how}. What it has answered is kept, and the same command goes on from there"


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-LINES:]) or "  (it is empty)"
