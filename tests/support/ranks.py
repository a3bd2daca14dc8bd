"""Commands and code in processes of their own."""

import json
import os
import random
import socket
import subprocess
import sys
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


def on_two_ranks(tmp_path: Path, module: str, *statements: str, **environment: str) -> None:
    """Run statements of a test module's names in two processes; `folder` is what they train in."""
    done = launched([sys.executable, script(tmp_path, module, *statements), tmp_path / "two"], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def by_torchrun(ranks: int, folder: Path, module: str, timeout: float) -> None:
    """Call a test module's `on_ranks(folder)` in so many processes."""
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", ranks]
    done = launched([*command, script(folder, module, "on_ranks(folder)"), folder], timeout=timeout)
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
