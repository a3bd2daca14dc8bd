"""What can go wrong while a run is on its way: docs/faults.md is the table of it.

`make test-faults` kills 200 times; the default suite less often.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import faults_named
from ranks import free_port, launched, on_two_ranks, recipe
from test_launch import TRAIN
from toy import metrics, trainer

import posttrain
from posttrain import hooks
from posttrain.blocks.checkpoints import manifest, state
from posttrain.blocks.checkpoints.checkpoint import Resume
from posttrain.blocks.checkpoints.manifest import checkpoints, verify
from posttrain.blocks.loggers.logger import JSONL
from posttrain.blocks.models.packed import PackedModel
from posttrain.errors import CheckpointError, PosttrainError, RecipeError, TrainingError
from posttrain.runtime.watchdog import At, diagnosis

KILLS = int(os.environ.get("POSTTRAIN_KILLS", "6"))
"""Of each kind of run."""
KINDS: dict[str, dict[str, Any]] = {
    "packed": {}, "padded": {"packing": False}, "streaming": {"streaming": True}, "dpo": {}, "two ranks": {},
}  # fmt: skip


def run_of(kind: str, folder: Path) -> Any:
    """Dropout, several passes, evaluations, and checkpoints that are pruned."""
    return trainer(
        folder, posttrain.DPOTrainer if kind == "dpo" else posttrain.SFTTrainer, checkpoint=[Resume(every=2)], max_steps=10, rows=40, eval_rows=5, eval_every=3, micro_batch_size=2,
        gradient_accumulation_steps=1 if kind == "two ranks" else 2, model={"config": {"attention_dropout": 0.1}},
        **KINDS[kind],
    )  # fmt: skip


def mortal(kind: str, folder: Path, die_at: int, environment: dict[str, str]) -> None:
    """Train in a process that kills itself at the n-th step, evaluation, write, sync, rename or removal."""
    os.environ.update(environment)
    left = die_at

    def tick(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = function(*args, **kwargs)
            tick()
            return result

        return wrapped

    watched = ((os, "fsync"), (os, "rename"), (Path, "rename"), (shutil, "rmtree"), (Path, "unlink"), (state, "save_file"),
               (manifest, "write_synced"))  # fmt: skip
    for owner, name in watched:
        setattr(owner, name, ticking(getattr(owner, name)))
    moments = ("trainer.step", "trainer.loss", "trainer.count", "trainer.evaluate")
    run_of(kind, folder).train(callbacks=[hooks.before(moment)(tick) for moment in moments])


def live(kind: str, folder: Path, die_at: int, victim: int = 0) -> bool:
    """Train in processes of their own, one of which dies, and say whether it did."""
    fork, ranks = multiprocessing.get_context("fork"), 2 if kind == "two ranks" else 1
    port, processes = str(free_port()), []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "mortal",
        } if ranks > 1 else {}  # fmt: skip
        processes.append(
            fork.Process(target=mortal, args=(kind, folder, die_at if rank == victim else -1, environment))
        )
    for process in processes:
        process.start()
    processes[victim].join()
    died = processes[victim].exitcode == -signal.SIGKILL
    for process in processes:
        if died:
            process.kill()  # as launchers do
        process.join()
        assert died or process.exitcode == 0
    return died


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_at_random_moments_changes_no_bit_and_always_leaves_a_checkpoint(tmp_path: Path, kind: str) -> None:
    run_of(kind, tmp_path / "imports everything").train()  # which the processes are then forked with
    assert not live(kind, tmp_path / "whole", -1)
    expected = metrics(tmp_path / "whole")
    draw, deaths, life = random.Random(kind), 0, 0
    while deaths < KILLS:
        folder, had_one, killed_here = tmp_path / f"life-{life}", False, 0
        life += 1
        while killed_here < 4 and live(kind, folder, draw.randrange(1, 70), draw.randrange(1 + (kind == "two ranks"))):
            deaths, killed_here = deaths + 1, killed_here + 1
            left = checkpoints(folder)
            assert all(verify(found) is None for found in left)  # whatever is named step-N is whole
            assert left or not had_one
            had_one = bool(left)
        assert killed_here < 4 or not live(kind, folder, -1)
        assert metrics(folder) == expected
        assert not list(folder.glob("*.tmp-*"))
        shutil.rmtree(folder)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own, as small as asked for."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_at_any_write_costs_nothing_but_time(tmp_path: Path) -> None:
    """From a disk that holds nothing to one that holds everything, in steps of one page or more."""
    run_of("packed", tmp_path / "whole").train()
    expected, failures = metrics(tmp_path / "whole"), set()
    for size in [4, 8, 12, 16, 20, 24, *range(60, 3000, 120)]:
        folder = tmp_path / f"disk-{size}"
        with small_disk(folder, size):
            try:
                run_of("packed", folder).train()
                done = True
            except PosttrainError as error:  # a message, never a traceback
                assert "No space left" in str(error), error
                failures.add(str(error).partition(":")[0])
                done = False
            assert all(verify(found) is None for found in checkpoints(folder))
            if not done:
                assert not list(folder.glob("step-*.tmp-*"))
                subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
                run_of("packed", folder).train()
            assert metrics(folder) == expected
        if done:
            break
    assert done
    assert len(failures) >= 3, failures


def poisoned(step: int, times: int = 1) -> Any:
    """Makes gradients of a step not finite."""

    @hooks.after("trainer.loss")
    def poison(trainer: Any, loss: torch.Tensor) -> torch.Tensor | None:
        return loss * float("nan") if step <= trainer.run.step + 1 < step + times else None

    return poison


def test_a_run_that_dies_leaves_what_is_needed_to_see_why(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    keys = {"data": {"sources": [str(sums)], "max_length": 64, "packing": False, "cache_dir": str(tmp_path / "cache")}}
    file = recipe(tmp_path, tiny_model, sums, max_steps=6, log_every=100, micro_batch_size=2, **keys)
    run = posttrain.load(file)
    with pytest.raises(TrainingError, match="step 3: loss is nan"):
        run.train(callbacks=[poisoned(3)])
    said = (run.output_dir / "failure.txt").read_text()
    assert said.startswith("step 3 of 6 failed on rank 0 of 1")
    for wanted in (
        "Traceback (most recent call last)",
        "TrainingError: step 3",
        "last metrics\n",
        "  loss nan",
        "torch 2",
    ):
        assert wanted in said
    rows = [json.loads(line) for line in (run.output_dir / "failure-rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 3]
    questions = [json.loads(line) for line in sums.read_text().splitlines()]
    for row in rows:
        (question,) = [
            q for q in questions if q["prompt"] in row["text"] and row["supervised"].startswith(q["response"])
        ]
        assert question["response"] in row["text"]


def test_rows_of_the_step_that_failed_are_those_it_was_given(tmp_path: Path) -> None:
    given: list[torch.Tensor] = []

    @hooks.before("trainer.step")
    def fail(trainer: Any, batches: list[Any]) -> None:
        given[:] = [batch["input_ids"] for batch in batches]
        if trainer.run.step == 7:
            raise ZeroDivisionError("by nothing")

    with pytest.raises(ZeroDivisionError):
        run_of("packed", tmp_path).train(callbacks=[fail])
    rows = [json.loads(line) for line in (tmp_path / "failure-rows.jsonl").read_text().splitlines()]
    tokens = [token for row in rows for token in row["input_ids"]]
    assert tokens == [int(token) for batch in given for token in batch.flatten() if token]  # 0 is padding


def test_a_step_that_is_not_finite_can_be_left_out(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=6, on_nonfinite="skip", log_every=3).train(callbacks=[poisoned(3)])
    found = metrics(tmp_path)
    assert [row["loss"] is None for row in found] == [False, False, True, False, False, False]
    assert found[2]["skipped_steps"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    rows = [json.loads(line) for line in (tmp_path / "skipped-rows.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {3}
    without = trainer(tmp_path / "stop", max_steps=6).train()
    kept = trainer(tmp_path / "none", max_steps=6, on_nonfinite="skip").train()
    for a, b in zip(without.model.parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # the policy changes nothing where all is finite


def test_steps_that_are_never_finite_end_the_run_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no gradient of 20 steps in a row is finite"):
        trainer(tmp_path, max_steps=100, on_nonfinite="skip").train(callbacks=[poisoned(3, 99)])


def test_deepspeed_refuses_to_leave_steps_out(tmp_path: Path) -> None:
    from posttrain.blocks.parallel.strategy import DeepSpeed

    with pytest.raises((RecipeError, ValueError), match="only `stop` is possible"):
        trainer(tmp_path, on_nonfinite="skip", strategy=DeepSpeed()).train()


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    seen: list[str] = []

    @hooks.before("trainer.step")
    def second(owner: Any, batches: Any) -> None:
        if owner.run.step == 3:
            with pytest.raises(CheckpointError) as error:
                run_of("packed", tmp_path).train()
            seen.append(str(error.value))

    run_of("packed", tmp_path).train(callbacks=[second])
    assert re.search(rf"is in use by another run \(process {os.getpid()} on \S+\); give another output_dir", seen[0])
    assert len(seen) == 1
    assert run_of("packed", tmp_path).train().status == "finished"  # the lock is gone with the run


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of("packed", tmp_path / "whole").train()
    draw, real = random.Random(0), time.time

    monkeypatch.setattr(time, "time", lambda: real() + draw.uniform(-1e8, 1e8))
    for _ in range(2):
        clone = run_of("packed", tmp_path / "jumps")
        clone.stop_after = 5
        clone.train()
    assert metrics(tmp_path / "jumps") == metrics(tmp_path / "whole")


def test_a_hub_that_is_away_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model 'nobody/nothing' cannot be loaded|tokenizer 'nobody/nothing' cannot"):
        posttrain.SFTTrainer(
            model=posttrain.HFModel(name_or_path="nobody/nothing"),
            data=posttrain.SFTData(sources=["nobody/nowhere"]), output_dir=tmp_path / "run", logger=[JSONL()],
        ).train()  # fmt: skip


HANGING = """
import os, time, posttrain

@posttrain.block("callback", "hanging")
class Hanging:
    @posttrain.before("trainer.loss")
    def hang(self, trainer, batch):
        if os.environ["RANK"] == "1" and trainer.run.step == 2:
            time.sleep(500)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    hanging = {"code": ["hanging.py"], "callbacks": ["hanging"], "devices": 2, "hang_after": 4.0}
    done = launched([*TRAIN, recipe(tmp_path, tiny_model, sums, **hanging)])
    assert done.returncode == 1
    assert re.search(r"error: nothing has moved for 4 seconds: the others wait for rank 1 \(\S+\), which is in hang "
                     r"\(hanging.py:9\)", done.stderr), done.stderr[-3000:]  # fmt: skip
    assert re.search(r'File ".*hanging.py", line 9 in hang', done.stderr)  # where it is
    assert "the others wait for rank 1" in (tmp_path / "run" / "failure-rank-1.txt").read_text()


@pytest.mark.parametrize("slow", ["a checkpoint", pytest.param("an export", marks=pytest.mark.slow)])
def test_a_disk_that_is_slow_is_no_hang(tmp_path: Path, slow: str) -> None:
    """Writing takes four times as long as `hang_after`; the other rank waits."""
    on_two_ranks(
        tmp_path, "test_faults", f"with slow_disk({slow!r}):",
        "    run = trainer(folder, devices=2, micro_batch_size=2, max_steps=2, hang_after=2.0).train()",
        "assert run.status == 'finished'",
    )  # fmt: skip


@contextmanager
def slow_disk(what: str) -> Iterator[None]:
    """Let the files of rank zero take eight seconds."""
    owner, name = (state, "write") if what == "a checkpoint" else (PackedModel, "save_pretrained")
    original = getattr(owner, name)

    def slowly(*args: Any, **kwargs: Any) -> None:
        folder = args[1].parent if what == "a checkpoint" else args[1]
        folder.mkdir(exist_ok=True)
        if os.environ["LOCAL_RANK"] == "0":
            for _ in range(16):
                with (folder / "rank-00000.safetensors").open("ab") as file:
                    file.write(b"0" * 1000)
                time.sleep(0.5)
            (folder / "rank-00000.safetensors").unlink()
        original(*args, **kwargs)

    setattr(owner, name, slowly)
    try:
        yield
    finally:
        setattr(owner, name, original)


def test_who_is_behind() -> None:
    begun, waiting = At(7, "a", "save (state.py:9)", False), At(7, "b", "backward (torch/autograd/graph.py:8)", True)
    assert diagnosis({0: begun}, 2, 9)[1].endswith("the others wait for rank 1, which has not begun")
    assert diagnosis({0: waiting, 1: begun}, 2, 9)[0] == [1]
    behind, said = diagnosis({0: waiting, 1: waiting}, 2, 9)
    assert behind == []
    assert "all ranks wait in the same place, backward (torch/autograd/graph.py:8)" in said
    many = {rank: At(5 if rank > 2 else 9, f"host{rank}", "read (loader.py:3)", False) for rank in range(20)}
    assert "rank 3, 4, 5, 6, 7, 8, 9, 10 and more (host3), which is in read (loader.py:3)" in diagnosis(many, 20, 9)[1]


def test_the_table_of_faults_names_tests_that_exist() -> None:
    root = Path(__file__).parent.parent
    named = faults_named()
    there = {
        name for file in root.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named
    assert named <= there
