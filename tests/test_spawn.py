"""Several processes, several nodes: one error, the right one; and a run that goes on by itself when a process dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_ranks import BIN, ROOT, launched, recipe
from toy import losses

CALLBACK = """
import os, signal
from pathlib import Path
from posttrain import after, block

@block("callback", "trouble")
class Trouble:
    how: str
    mark: str

    @after("trainer.count")
    def happen(self, trainer, nothing):
        if os.environ["RANK"] != "1" or trainer.run.step != 3 or Path(self.mark).exists():
            return
        Path(self.mark).touch()
        if self.how == "raise":
            raise ValueError("this rank is broken")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def troubled(tmp_path: Path, model: Path, source: Path, how: str) -> Path:
    code = tmp_path / "troubles.py"
    code.write_text(CALLBACK)
    trouble = {"type": "trouble", "how": how, "mark": str(tmp_path / "mark")}
    return recipe(
        tmp_path, model, source, devices=2, code=[str(code)], callbacks=[trouble],
        checkpoint=[{"type": "resume", "every": 2}],
    )  # fmt: skip


def test_the_rank_that_failed_first_is_the_only_one_heard(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = troubled(tmp_path, tiny_model, sums, "raise")
    done = launched([sys.executable, "-m", "posttrain.cli", "train", file])
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("error: rank 1 failed first: ValueError: this rank is broken")
    assert "in happen" in done.stderr


def test_errors_on_purpose_come_without_a_traceback_and_once(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = recipe(tmp_path, tiny_model, sums, devices=2, precision="16-mixed", strategy="fsdp")
    done = launched([sys.executable, "-m", "posttrain.cli", "train", file])
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "precision and strategy do not go together" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_goes_on_by_itself_when_a_process_is_killed(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = troubled(tmp_path, tiny_model, sums, "kill")
    done = launched([sys.executable, "-m", "posttrain.cli", "train", file])
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in done.stderr
    (tmp_path / "mark").unlink()
    again = launched([sys.executable, "-m", "posttrain.cli", "train", file, "--restarts", "1", "resume=never"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "mark").exists()
    killed = losses(tmp_path / "run")
    whole = launched([sys.executable, "-m", "posttrain.cli", "train", file, "resume=never"])
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert losses(tmp_path / "run") == killed


def test_several_nodes_need_a_launcher(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    done = launched([sys.executable, "-m", "posttrain.cli", "train", recipe(tmp_path, tiny_model, sums, num_nodes=2)])
    assert done.returncode == 2
    assert "each node must run `torchrun" in done.stderr


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.slow
def test_two_nodes_train_like_one_process_and_one_of_them_writes(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    """Two torchrun agents that meet on the loopback interface."""
    file, port = recipe(tmp_path, tiny_model, sums, gradient_accumulation_steps=1), free_port()
    alone = launched([sys.executable, "-m", "posttrain.cli", "train", file, "gradient_accumulation_steps=2",
                      f"output_dir={tmp_path}/alone"])  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    command: list[Any] = [
        BIN / "torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=two",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", "-m", "posttrain.cli", "train", file,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted("step 6/6" in each for each in said) == [False, True]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.slow
def test_the_slurm_script_saves_before_the_limit_and_goes_on_when_it_is_queued_again(
    tmp_path: Path, tiny_model: Path, sums: Path
) -> None:
    """With an `srun` that starts an agent for each node on this machine, and a `scontrol` that takes notes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = requeue ] && echo "$@" >> {tmp_path}/queued || echo 127.0.0.1\n'
    )
    (programs / "srun").write_text(
        '#!/bin/bash\nshift\npids=()\nfor _ in 1 2; do "$@" & pids+=($!); done\n'
        "trap 'kill -USR1 \"${pids[@]}\"' USR1\n"
        'for pid in "${pids[@]}"; do while kill -0 $pid 2>/dev/null; do wait $pid; done; done\n'
    )
    (programs / "torchrun").symlink_to(BIN / "torchrun")
    for program in ("scontrol", "srun"):
        (programs / program).chmod(0o755)
    file, script = recipe(tmp_path, tiny_model, sums, max_steps=5000), tmp_path / "train.sbatch"
    script.write_text(
        (ROOT / "examples/slurm/train.sbatch").read_text().replace("$first_node:29400", f"127.0.0.1:{free_port()}")
    )
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "two", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1",
        "POSTTRAIN_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    job = subprocess.Popen(
        ["bash", str(script), str(file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert "received SIGUSR1" in said, said[-3000:]
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    reached = len(losses(tmp_path / "run"))
    resumed = launched([sys.executable, "-m", "posttrain.cli", "train", file, "stop_after=1", "micro_batch_size=2"])
    assert f"going on after step {reached}" in resumed.stdout, resumed.stderr[-2000:]
