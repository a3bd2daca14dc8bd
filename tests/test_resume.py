"""A run that was cut goes on as if nothing had happened, whatever cut it; a damaged checkpoint is never used."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import losses, metrics, trainer

import posttrain.hooks as hooks
from posttrain.blocks.checkpoints import manifest, state
from posttrain.blocks.checkpoints.checkpoint import HuggingFace, Resume
from posttrain.blocks.checkpoints.manifest import checkpoints
from posttrain.errors import CheckpointError
from posttrain.trainers.sft import SFTTrainer

STEPS = 12
KINDS = [{"packing": True}, {"packing": False}, {"streaming": True}, {"streaming": True, "packing": False}]


def long(folder: Path, **keys: Any) -> SFTTrainer:
    """Dropout, so that random numbers matter; several passes, so that the order does."""
    keys = {"checkpoint": [Resume(every=3)], "max_steps": STEPS, "rows": 60, "micro_batch_size": 2, **keys}
    keys = {"model": {"config": {"attention_dropout": 0.1}}, "gradient_accumulation_steps": 2, **keys}
    return trainer(folder, **keys)


def assert_same_weights(one: Any, other: Any) -> None:
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_run_in_pieces_equals_a_run_in_one(tmp_path: Path, kind: dict[str, Any]) -> None:
    whole = long(tmp_path / "whole", **kind).train()
    for piece in (2, 5, 3):
        stopped = long(tmp_path / "cut", stop_after=piece, **kind).train()
        assert stopped.status == "interrupted"
    resumed = long(tmp_path / "cut", **kind).train()
    assert (resumed.first_step, resumed.step) == (10, STEPS)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_ends(tmp_path: Path, number: int) -> None:
    trained = long(tmp_path / "whole").train()
    handler, once = signal.getsignal(number), []

    @hooks.before("trainer.step")
    def send(trainer: SFTTrainer, batches: Any) -> None:
        if trainer.run.step == 4 and not once:
            once.append(True)
            os.kill(os.getpid(), number)

    stopped = long(tmp_path / "cut").train(callbacks=[send])
    assert (stopped.step, stopped.status, stopped.signal) == (5, "interrupted", number)
    assert signal.getsignal(number) == handler
    resumed = long(tmp_path / "cut").train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert_same_weights(trained, resumed)


def damage(folder: Path, how: str) -> None:
    tensors, said = folder / "rank-00000.safetensors", folder / "manifest.json"
    if how == "a flipped bit":
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif how == "a truncated file":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "a missing file":
        tensors.unlink()
    elif how == "an unreadable manifest":
        said.write_text(said.read_text()[:-9])
    elif how == "an edited manifest":
        said.write_text(re.sub(r'"step": \d+', '"step": 99', said.read_text()))
    else:
        said.unlink()


@pytest.mark.parametrize(
    "how",
    [
        "a flipped bit",
        "a truncated file",
        "a missing file",
        "an unreadable manifest",
        "an edited manifest",
        "no manifest",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    long(tmp_path).train()
    expected = metrics(tmp_path)
    damage(tmp_path / "step-00000012", how)
    resumed = long(tmp_path).train()
    assert resumed.first_step == 9
    assert "step-00000012" in caplog.text
    assert metrics(tmp_path) == expected
    for found in checkpoints(tmp_path):
        damage(found, how)
    with pytest.raises(CheckpointError, match=r"no checkpoint in this folder is whole.*resume=never"):
        long(tmp_path).train()


def test_a_checkpoint_runs_no_code_when_it_is_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    long(tmp_path / "run", stop_after=3).train()
    found = checkpoints(tmp_path / "run")[0]
    file, said = found / "rank-00000.safetensors", manifest.read(found)
    torch.save({"model": Bomb()}, file)
    said["files"][file.name] = manifest.describe(file)
    said.pop("seal")
    (found / "manifest.json").write_text(json.dumps({**said, "seal": manifest.seal(said)}))
    with pytest.raises(CheckpointError, match="does not hold safetensors files"):
        long(tmp_path / "run").train()
    assert not canary.exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    long(tmp_path, checkpoint=[Resume(every=2, keep=3)]).train()
    assert [found.name for found in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (12, 10, 8)]


def test_checkpoints_at_the_end_of_passes(tmp_path: Path) -> None:
    long(
        tmp_path, checkpoint=[Resume(every=None, every_epochs=1, keep=99, at_end=False)], packing=False, rows=20
    ).train()
    assert [found.name for found in checkpoints(tmp_path)] == ["step-00000010", "step-00000005"]


def test_the_folder_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    long(tmp_path, stop_after=4).train()
    with pytest.raises(CheckpointError) as error:
        long(tmp_path, seed=7, rows=61).train()
    assert "seed: 42 there, 7 here" in str(error.value)
    assert "data.rows: 60 there, 61 here" in str(error.value)
    assert "resume=force" in str(error.value)
    forced = long(tmp_path, seed=7, rows=61, resume="force").train()
    assert (forced.first_step, forced.step) == (4, STEPS)


def test_a_new_start_clears_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    long(tmp_path).train()
    anew = long(tmp_path, seed=7, resume="never", max_steps=2).train()
    assert (anew.first_step, anew.step) == (0, 2)
    assert [found.name for found in checkpoints(tmp_path)] == ["step-00000002"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_another_cut_of_the_same_step_goes_on_and_another_step_is_refused(tmp_path: Path) -> None:
    # no dropout: it is drawn per micro-batch
    long(tmp_path / "whole", model={}).train()
    long(tmp_path / "cut", stop_after=5, model={}).train()
    long(tmp_path / "cut", micro_batch_size=4, gradient_accumulation_steps=1, model={}).train()
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    with pytest.raises(CheckpointError, match="4 rows per step, this run would take 8"):
        long(tmp_path / "cut", micro_batch_size=4, model={}).train()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_while_a_checkpoint_is_written_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    write, later, went_on = state.write, threading.Event(), []

    def slow(*args: Any) -> None:
        went_on.append(later.wait(10 if asynchronous else 0.1))
        write(*args)

    @hooks.before("trainer.step")
    def note(trainer: SFTTrainer, batches: Any) -> None:
        if trainer.run.step == 5:
            later.set()

    monkeypatch.setattr(state, "write", slow)
    recipe: dict[str, Any] = {"checkpoint": [Resume(every=3, at_end=False, asynchronous=asynchronous)], "max_steps": 6}
    long(tmp_path / "run", **recipe).train(callbacks=[note])
    assert went_on == [asynchronous, True]
    trained = long(tmp_path / "other", checkpoint=[], max_steps=6).train()
    assert_same_weights(trained, long(tmp_path / "run", **recipe).train())


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"folder .*file/run cannot be written"):
        long(tmp_path / "file" / "run").train()


def test_the_export_loads_in_transformers_and_gives_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = long(tmp_path, checkpoint=[HuggingFace()], max_steps=3).train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run.model.module.hf.eval()(ids).logits)


def test_an_interrupted_run_exports_nothing(tmp_path: Path) -> None:
    long(tmp_path, checkpoint=[HuggingFace()], stop_after=2).train()
    assert not (tmp_path / "huggingface").exists()


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.runtime.signals.MOMENT", -1.0)  # what comes twice within it is one

    @hooks.before("trainer.step")
    def twice(trainer: SFTTrainer, batches: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        long(tmp_path).train(callbacks=[twice])
