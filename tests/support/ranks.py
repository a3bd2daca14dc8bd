"""Commands and code in processes of their own."""

import atexit
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that is free, below those that other connections of this machine are given meanwhile."""
    for port in random.sample(range(10000, 30000), 100):
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")


def by_fabric(*command: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes of `fabric run`, at a port of its own: others may test on this machine too."""
    two = ["run", "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--main-port", free_port()]
    return launched([BIN / "fabric", *two, *command])


def launched(command: list[Any], **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    more = {"timeout": 200, **more}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **more)


def script(tmp_path: Path, module: str, *statements: str) -> Path:
    """Write a script of statements of a test module's names; `folder` is its first argument."""
    file = tmp_path / "script.py"
    rooms = [path for path in sys.path if Path(path).is_relative_to(ROOT / "tests")]
    lines = [
        "import sys", f"sys.path[:0] = {rooms!r}", "from pathlib import Path", f"from {module} import *",
        "folder = Path(sys.argv[1])", 'if __name__ == "__main__":', *(f"    {statement}" for statement in statements),
    ]  # fmt: skip
    file.write_text("\n".join(lines) + "\n")
    return file


class Pair:
    """Two ranks that have started: they run one script after the other (see rank.py)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.number = 0
        command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, Path(__file__).parent / "rank.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [*map(str, command), str(self.folder), str(os.getpid())],
                stdout=log, stderr=log, env=environment,
            )  # fmt: skip
        atexit.register(self.end)

    def run(self, argv: list[Any], environment: dict[str, str], timeout: float) -> None:
        """Run a script, and raise what it raises."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        job, number = {"argv": list(map(str, argv)), "environment": environment}, self.number
        part, self.number = self.folder / "part", number + 1
        part.write_text(json.dumps(job))
        part.rename(self.folder / f"{number}.json")
        answers = [self.folder / f"{number}-{rank}" for rank in range(2)]
        deadline = time.monotonic() + timeout
        while not all(answer.exists() for answer in answers):
            time.sleep(0.02)
            if self.process.poll() is not None or time.monotonic() > deadline:
                break
        errors = [answer.read_text() for answer in answers if answer.exists()]
        if len(errors) < 2 or any(errors):
            self.end()
            raise AssertionError("\n".join(error[-3000:] for error in [*errors, (self.folder / "log").read_text()]))

    def end(self) -> None:
        """Leave no process: torchrun ends its ranks, and they end themselves without it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


pairs: list[Pair] = []
"""The last is in use."""


def on_two_ranks(tmp_path: Path, module: str, *statements: str, timeout: float = 200, **environment: str) -> None:
    """Run statements of a test module's names in two processes; `folder` is what they train in, `tmp_path / "two"`.

    The processes are those of the last such test of this process: put back what you patch.
    """
    if not pairs or pairs[-1].process.poll() is not None:
        pairs.append(Pair())
    pairs[-1].run([script(tmp_path, module, *statements), tmp_path / "two"], environment, timeout)


def on_many_ranks(count: int, tmp_path: Path, module: str, *statements: str, timeout: float) -> None:
    """The same in so many processes, which are started for it."""
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", count]
    done = launched([*command, script(tmp_path, module, *statements), tmp_path / "two"], timeout=timeout)
    assert done.returncode == 0, done.stderr[-6000:]


def recipe(tmp_path: Path, model: Path, source: Path, **keys: Any) -> Path:
    file = tmp_path / "recipe.yaml"
    data = {
        "type": "sft", "model": {"name_or_path": str(model)}, "data": {"sources": [str(source)], "max_length": 128},
        "optimizer": {"lr": 1e-3}, "output_dir": str(tmp_path / "run"), "accelerator": "cpu", "max_steps": 6,
        "log_every": 1, **keys,
    }  # fmt: skip
    file.write_text(json.dumps(data))  # JSON is YAML
    return file
