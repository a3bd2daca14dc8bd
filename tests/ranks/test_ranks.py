"""Two processes give what one gives, however they are started; and a run goes on with another number of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import BIN, ROOT, by_fabric, launched, on_two_ranks, recipe
from toy import losses, metrics, trainer

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from toy import trainer
if __name__ == "__main__":
    trainer(Path(sys.argv[1]), eval_rows=5, eval_every=4, **eval(sys.argv[2])).train()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(tests=str(ROOT / "tests" / "support")))
    return file


def start(how: str, script: Path, folder: Path, keys: dict[str, Any]) -> None:
    call = [script, folder, repr(keys | ({"devices": 2} if how == "plain" else {}))]
    launcher: dict[str, list[Any]] = {
        "plain": [sys.executable],
        "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2"],
    }
    done = by_fabric(*call) if how == "fabric run" else launched([*launcher[how], *call])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("how", ["plain", "fabric run", "torchrun"])
def test_two_ranks_train_like_one(how: str, script: Path, tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone", eval_rows=5, eval_every=4)
    alone.train()
    start(how, script, tmp_path / "two", {"micro_batch_size": 1, "gradient_accumulation_steps": 2})
    for one, two in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        assert one == pytest.approx(two, abs=1e-6, rel=1e-5)
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / name / "huggingface" / "model.safetensors") for name in ("alone", "two"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


def test_a_run_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    trainer(tmp_path / "alone", eval_rows=5, eval_every=4).train()
    keys = "eval_rows=5, eval_every=4, micro_batch_size=2, stop_after=5"
    on_two_ranks(tmp_path, "toy", f"trainer(folder, {keys}).train()")
    resumed = trainer(tmp_path / "two", eval_rows=5, eval_every=4).train()
    assert resumed.first_step == 5
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), abs=1e-6)


def test_fabric_run_starts_a_recipe(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = recipe(tmp_path, tiny_model, sums)
    done = by_fabric(ROOT / "posttrain" / "cli.py", "train", file)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in done.stdout
    assert len(losses(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "huggingface" / "model.safetensors").exists()


def test_what_the_launcher_and_the_recipe_say_must_agree(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    file = recipe(tmp_path, tiny_model, sums, devices=3)
    done = by_fabric(ROOT / "posttrain" / "cli.py", "train", file)
    assert done.returncode != 0
    assert "devices: the recipe says 3, but `fabric run` was given --devices=2" in done.stderr


@pytest.mark.slow
def test_a_rank_whose_gloo_threads_are_late_ends_cleanly() -> None:
    """Without `launch._settle`, two of three such runs end with SIGABRT (see late_thread.py)."""
    hog = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", hog]) for _ in range(2)]
    try:
        two = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2"]
        done = launched([*two, ROOT / "tests" / "support" / "late_thread.py", "settled"])
    finally:
        for process in hogs:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_ends_a_run_cleanly_and_the_same_command_goes_on(
    tmp_path: Path, tiny_model: Path, sums: Path, ranks: int
) -> None:
    file = recipe(
        tmp_path, tiny_model, sums, max_steps=400, devices=ranks, checkpoint=[{"type": "resume", "every": None}]
    )
    command = [sys.executable, "-m", "posttrain.cli", "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output[-2000:]
    assert "received SIGTERM" in output
    assert "run the same command again" in output
    reached = len(losses(tmp_path / "run"))
    assert 5 <= reached < 400
    again = launched([*command, f"stop_after={3}"])
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"going on after step {reached}" in again.stdout
    assert len(losses(tmp_path / "run")) == reached + 3


def test_gradients_are_there_once_also_where_fabric_chose_the_strategy(tmp_path: Path) -> None:
    on_two_ranks(
        tmp_path, "toy", "run = trainer(folder, devices=2, micro_batch_size=2, max_steps=1).train()",
        "assert run.model._forward_module.gradient_as_bucket_view",
    )  # fmt: skip


def test_a_step_that_is_left_out_shows_the_rows_that_ranks_share(tmp_path: Path) -> None:
    """Each rank has some columns of the rows, and no document as a whole."""
    on_two_ranks(
        tmp_path, "toy", "import posttrain, torch",
        "spoil = posttrain.after('trainer.loss')(lambda trainer, loss: loss * float('nan') if trainer.run.step == 1 else None)",
        "run = trainer(folder, devices=2, micro_batch_size=4, max_steps=3, on_nonfinite='skip', "
        "sequence=posttrain.Ulysses(size=2), checkpoint=[]).train(callbacks=[spoil])",
        "assert run.memory['skipped_steps'] == 1",
    )  # fmt: skip
    shown = [
        json.loads(line) for file in (tmp_path / "two").glob("skipped-rows*") for line in file.read_text().splitlines()
    ]
    assert {row["step"] for row in shown} == {2}
    assert {row["row"] for row in shown} == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_of_two_ranks_fails_a_test(tmp_path: Path, rank: int) -> None:
    """And the next test has ranks that work."""
    with pytest.raises(AssertionError, match="there is no oven"):
        on_two_ranks(
            tmp_path, "toy", "import os, torch", f"if os.environ['RANK'] == '{rank}':",
            "    raise ValueError('there is no oven')", "trainer(folder, devices=2, micro_batch_size=2).train()",
        )  # fmt: skip
    on_two_ranks(tmp_path, "toy", "trainer(folder, devices=2, micro_batch_size=2, max_steps=1).train()")
    assert len(losses(tmp_path / "two")) == 1
