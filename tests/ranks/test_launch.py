"""Launching as a user does it: one command, several nodes, SLURM; what fails says so itself, and what dies goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import BIN, ROOT, free_port, launched, recipe
from toy import losses, trainer

from posttrain.errors import RecipeError
from posttrain.runtime import launch
from posttrain.runtime.signals import Signals

CLI = ROOT / "posttrain" / "cli.py"
TRAIN = [sys.executable, "-m", "posttrain.cli", "train"]
FAILING = """
import os, posttrain
from posttrain.errors import TrainingError

@posttrain.block("callback", "failing")
class Failing:
    rank: str
    @posttrain.before("trainer.step")
    def fail(self, trainer, batches):
        if os.environ["RANK"] == self.rank and trainer.run.step == 2:
            raise {error}
"""
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [part for part in sys.argv[1:] if part != "--kill-on-bad-exit=1"]
nodes = int(os.environ["SLURM_NNODES"])
tasks = [
    subprocess.Popen(command, env=os.environ | dict(
        SLURM_PROCID=str(i), SLURM_NODEID=str(i), SLURM_LOCALID="0", SLURM_STEP_ID="0"))
    for i in range(nodes)
]
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def failing(tmp_path: Path, error: str, **keys: Any) -> dict[str, Any]:
    code = tmp_path / "failing.py"
    code.write_text(FAILING.format(error=error))
    return {"code": [code.name], "callbacks": [{"type": "failing", "rank": "1"}], "devices": 2, **keys}


@contextmanager
def started(*commands: list[Any], **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    found = [
        subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        for command in commands
    ]
    try:
        yield found
    finally:
        for process in found:
            process.terminate()
            process.communicate(timeout=60)


def wait_for_steps(run: Path, steps: int) -> None:
    log, deadline = run / "metrics.jsonl", time.monotonic() + 150
    while not log.exists() or log.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("error", "said", "tracebacks"),
    [
        ("TrainingError('the oven is cold')", "error: the oven is cold", 0),
        pytest.param("ZeroDivisionError('by nothing')", "ZeroDivisionError: by nothing", 1, marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_ends_all_and_its_error_is_the_one_to_read(
    tmp_path: Path, tiny_model: Path, sums: Path, error: str, said: str, tracebacks: int
) -> None:
    file = recipe(tmp_path, tiny_model, sums, **failing(tmp_path, error))
    done = launched([*TRAIN, file])
    assert done.returncode == 1, done.stderr[-3000:]
    assert said in done.stderr
    assert done.stderr.count("Traceback") == tracebacks
    assert "Connection closed" not in done.stderr  # what the other rank saw
    lines = [line for line in done.stderr.splitlines() if "rank 0" in line]
    assert all(line.startswith("rank 0 ends, because rank 1 failed") for line in lines)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_no_other_shows_a_traceback(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = recipe(tmp_path, tiny_model, sums, devices=2, max_steps=100_000, checkpoint=[])
    with started([*TRAIN, file]) as [agent]:
        wait_for_steps(tmp_path / "run", 5)
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        output, _ = agent.communicate(timeout=100)
    assert agent.returncode == 128 + signal.SIGKILL
    assert "was killed by SIGKILL; the same command goes on" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_torchrun_is_told_which_rank_failed(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = recipe(tmp_path, tiny_model, sums, **failing(tmp_path, "ZeroDivisionError('by nothing')"))
    done = launched([BIN / "torchrun", "--standalone", "--nproc-per-node=2", CLI, "train", file])
    assert done.returncode == 1
    root = done.stderr.split("Root Cause")[1]
    assert "rank      : 1" in root
    assert "ZeroDivisionError: by nothing" in root


@pytest.mark.slow
def test_two_nodes_go_on_by_themselves_after_a_rank_was_killed(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    """Two agents with a rank each; the curve is that of an uninterrupted run to the last bit."""
    keys = {"max_steps": 60, "checkpoint": [{"type": "resume", "every": 5}]}
    (tmp_path / "whole").mkdir()
    whole = recipe(tmp_path / "whole", tiny_model, sums, **keys, devices=2)
    assert launched([*TRAIN, whole]).returncode == 0
    file = recipe(tmp_path, tiny_model, sums, **keys)
    agent = [
        BIN / "torchrun", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d",
        "--rdzv-id=two", f"--rdzv-endpoint=localhost:{free_port()}", CLI, "train", file,
    ]  # fmt: skip
    with started(agent, agent, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as agents:
        wait_for_steps(tmp_path / "run", 12)
        [rank] = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        output = [process.communicate(timeout=200)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], output
    assert sum("going on after step" in text for text in output) == 1  # of both nodes, rank zero alone speaks
    assert sum(text.count("step 60/60") for text in output) == 1
    assert losses(tmp_path / "run") == losses(tmp_path / "whole" / "run")


@pytest.mark.slow
def test_the_slurm_script_saves_before_time_is_up_and_goes_on_when_it_runs_again(
    tmp_path: Path, tiny_model: Path, sums: Path
) -> None:
    file = recipe(tmp_path, tiny_model, sums, max_steps=300, checkpoint=[{"type": "resume", "every": None}])
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN.format(python=sys.executable))
    (tools / "scontrol").write_text(f'#!/bin/sh\n[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/asked\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    script = ["bash", ROOT / "examples" / "slurm" / "train.sbatch", file]
    environment = {
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "n[1-2]", "RANKS_PER_NODE": "1",
        "RENDEZVOUS_PORT": str(free_port()),
    }  # fmt: skip
    with started(script, **environment) as [job]:
        wait_for_steps(tmp_path / "run", 5)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    reached = len(losses(tmp_path / "run"))
    assert 5 <= reached < 300
    again = launched([*script, "stop_after=3"], env=environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"going on after step {reached}" in again.stdout
    assert "2 x cpu" in again.stdout


@pytest.mark.slow
def test_srun_alone_starts_a_recipe(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = recipe(tmp_path, tiny_model, sums)
    srun = tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    environment = {
        "SLURM_JOB_ID": str(free_port() % 1000), "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "posttrain",
    }  # fmt: skip
    done = launched([srun, *TRAIN, file], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 x cpu") == 1
    assert len(losses(tmp_path / "run")) == 6


def test_nodes_without_a_launcher_are_an_error_instead_of_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": None, "strategy": "auto"}
    with pytest.raises(RecipeError, match=r"num_nodes: 2 machines need a launcher"):
        launch.make_fabric(num_nodes=2, **asked)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(RecipeError, match=r"has 2 tasks, but the process was not started by srun"):
        launch.make_fabric(num_nodes=1, **asked)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(RecipeError, match=r"devices: the recipe says 4, but srun started 1"):
        launch.make_fabric(num_nodes=2, **asked | {"devices": 4})


def test_only_a_plain_command_starts_its_ranks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.ranks_to_start("cpu", 4, 1) == 4
    assert launch.ranks_to_start("cpu", "3", 1) == 3
    assert launch.ranks_to_start("cpu", "auto", 1) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launch.ranks_to_start("cpu", 4, 1) == 1


def test_one_request_may_arrive_twice_and_a_second_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    signals, now = Signals(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with signals.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # by the launcher and by the cluster
        assert signals.received == signal.SIGTERM
        now += 5
        with pytest.raises(KeyboardInterrupt, match="second signal"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)


def test_the_slurm_script_is_valid_bash() -> None:
    assert subprocess.run(["bash", "-n", ROOT / "examples" / "slurm" / "train.sbatch"]).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("accelerator", ["cuda", "mps", "gpu"])
def test_a_device_that_is_not_there_is_a_message(tmp_path: Path, accelerator: str) -> None:
    with pytest.raises(RecipeError, match=f"accelerator: {accelerator} was asked for, .*posttrain doctor"):
        trainer(tmp_path, accelerator=accelerator).train()


def test_the_rank_that_was_killed_is_named_and_not_one_that_the_launcher_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fail(arguments: Any) -> None:
        failures = {rank: ProcessFailure(rank, 1, code, "/nowhere") for rank, code in enumerate((-15, -6))}
        for failure in failures.values():
            failure.timestamp = 5  # whole seconds
        raise ChildFailedError("train", failures)

    monkeypatch.setattr(torch.distributed.run, "run", fail)
    assert launch.relaunch(2, "-m", ["posttrain.cli"]) == 128 + 6
    assert "rank 1 was killed by SIGABRT" in capsys.readouterr().err
