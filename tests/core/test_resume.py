"""A run that was cut goes on as if nothing had happened, whatever cut it; a damaged checkpoint is never used."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import LLAMA, losses, metrics, trainer

import posttrain
import posttrain.hooks as hooks
from posttrain.blocks.checkpoints import manifest, state
from posttrain.blocks.checkpoints.checkpoint import HuggingFace, Resume
from posttrain.blocks.checkpoints.manifest import checkpoints
from posttrain.blocks.data.kinds.sft import SFTData
from posttrain.blocks.loggers.logger import JSONL, TensorBoard
from posttrain.blocks.models.model import HFModel
from posttrain.blocks.optimizer import AdamW
from posttrain.blocks.scheduler import Cosine, Linear
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
    again = long(tmp_path, seed=7, resume="never", max_steps=2).train()
    assert (again.first_step, again.step) == (0, 2)
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("base", "asked"), [("bfloat16", None), ("float32", None), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_an_export_has_the_type_of_the_model_that_it_began_from(
    tmp_path: Path, base: str, asked: Any, tied: bool
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**LLAMA, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config, dtype=base).save_pretrained(tmp_path / "base")
    model: dict[str, Any] = {"name_or_path": str(tmp_path / "base"), "random_init": False, "config": {}}
    checkpoint = [HuggingFace(dtype=asked)]
    run = trainer(tmp_path / "run", model={**model, "config": {}}, checkpoint=checkpoint, max_steps=2).train()
    there = tmp_path / "run" / "huggingface"
    tensors = load_file(there / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{asked or base}"}
    assert ("lm_head.weight" in tensors) != tied
    assert json.loads((there / "config.json").read_text())["dtype"] == (asked or base)
    loaded = AutoModelForCausalLM.from_pretrained(there)
    for name, value in run.model.module.hf.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), value.to(loaded.dtype), rtol=0, atol=0)


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


# -- what belongs to the user ------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()
    }


def users_own(folder: Path) -> dict[str, str]:
    """Write files of somebody else into a folder, some of them named like ours."""
    names = ("notes.txt", "llama/config.json", "llama/model.safetensors", "step-by-step/plan.md", "step-00000001/todo")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return tree(folder)


def kept(folder: Path, files: dict[str, str]) -> bool:
    return files.items() <= tree(folder).items()


def test_an_export_leaves_alone_what_else_is_in_its_folder(tmp_path: Path) -> None:
    models = tmp_path / "models"
    mine = users_own(models)
    for seed in (1, 2):  # the second one replaces the first
        long(tmp_path / str(seed), checkpoint=[HuggingFace(output_dir=models)], max_steps=1, seed=seed).train()
        assert kept(models, mine)
        assert set(tree(models)) - set(mine) == {
            "config.json", "generation_config.json", "model.safetensors", "posttrain-export.json",
        }  # fmt: skip
    weights = load_file(models / "model.safetensors")["model.norm.weight"]
    saved = load_file(checkpoint_of(tmp_path / "2"))["model/hf.model.norm.weight"]
    torch.testing.assert_close(weights, saved)


def checkpoint_of(folder: Path) -> Path:
    """Train what a folder holds for no further step, and return the file of its checkpoint."""
    long(folder, checkpoint=[Resume()], max_steps=1, seed=2, resume="never").train()
    return folder / "step-00000001" / "rank-00000.safetensors"


def test_the_folder_of_the_run_can_hold_its_export(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"checkpoint": [Resume(), HuggingFace(output_dir=tmp_path)]}
    with pytest.raises(CheckpointError, match="exports at steps would lie among the checkpoints"):
        long(tmp_path, checkpoint=[Resume(), HuggingFace(output_dir=tmp_path, every=1)]).train()
    long(tmp_path, **keys, max_steps=1, resume="force", seed=7).train()
    long(tmp_path, **keys, max_steps=2, resume="force").train()
    assert {"step-00000002", "model.safetensors", "recipe.yaml"} <= {path.name for path in tmp_path.iterdir()}
    long(tmp_path, **keys, max_steps=3, resume="force").train()
    assert {"step-00000003", "model.safetensors", "recipe.yaml"} <= {path.name for path in tmp_path.iterdir()}


def test_exports_at_steps_outlive_the_one_at_the_end(tmp_path: Path) -> None:
    long(tmp_path, checkpoint=[HuggingFace(every=1)], max_steps=2).train()
    assert all((tmp_path / "huggingface" / name / "config.json").exists() for name in ("", "step-00000001"))


@pytest.mark.parametrize("place", ["output_dir", "the run's folder", "a file", "the base"])
def test_an_export_that_would_replace_what_is_not_ours_is_refused_before_training(tmp_path: Path, place: str) -> None:
    folder, keys = tmp_path / "run" / "huggingface", {"checkpoint": [HuggingFace()]}
    if place != "the run's folder":
        folder = tmp_path / "models"
        keys["checkpoint"] = [HuggingFace(output_dir=folder)]
    if place == "a file":
        folder.write_text("mine")
    elif place == "the base":
        long(tmp_path / "first", checkpoint=[HuggingFace(output_dir=folder)], max_steps=1).train()
        keys["model"] = {"name_or_path": str(folder), "random_init": False, "config": {}}
    else:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="is a file|would replace"):
        long(tmp_path / "run", **keys).train()
    assert kept(tmp_path, before)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_export_that_finds_a_file_in_its_way_at_the_end_is_kept_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "models"

    @hooks.before("trainer.step")
    def put(trainer: SFTTrainer, batches: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("mine")

    with pytest.raises(CheckpointError, match=r"the model is in .*models.tmp-\d+, .*another config.json"):
        long(tmp_path / "run", checkpoint=[HuggingFace(output_dir=folder)], max_steps=1).train(callbacks=[put])
    assert tree(folder) == {"config.json": "mine"}
    assert (next(tmp_path.glob("models.tmp-*")) / "model.safetensors").exists()


def test_an_export_of_an_earlier_version_in_the_folder_of_its_run_is_replaced(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"checkpoint": [HuggingFace()], "resume": "force"}
    long(tmp_path, **keys, max_steps=1).train()
    (tmp_path / "huggingface" / "posttrain-export.json").unlink()  # 0.1 wrote none
    (tmp_path / "huggingface" / "notes.txt").write_text("mine")
    first = load_file(tmp_path / "huggingface" / "model.safetensors")
    long(tmp_path, **keys, max_steps=1, seed=9).train()
    second = load_file(tmp_path / "huggingface" / "model.safetensors")
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])
    assert (tmp_path / "huggingface" / "notes.txt").read_text() == "mine"


def test_a_new_start_removes_nothing_that_no_run_has_written(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"checkpoint": [Resume(every=1), HuggingFace()], "max_steps": 2}
    keys["logger"] = [JSONL(), TensorBoard()]
    long(tmp_path, **keys).train()
    mine = users_own(tmp_path)
    for name in (
        "tensorboard/of-mine.png",
        "huggingface/card.md",
        "huggingface/step-7/x",
        "refresh/x",
        "failure-rates",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        mine[name] = "mine"
    mine = {name: text for name, text in mine.items() if text.startswith("mine")}
    long(tmp_path, **{**keys, "checkpoint": []}, resume="never").train()
    there = {name for name in tree(tmp_path) if "events.out" not in name and not name.startswith("cache/")}
    left = there - set(mine)
    assert left == {".lock", "ledger.json", "metrics.jsonl", "recipe.yaml", "versions.json"}
    assert kept(tmp_path, mine)


def test_folders_of_the_users_are_no_checkpoints(tmp_path: Path) -> None:
    mine = users_own(tmp_path)
    keys: dict[str, Any] = {"checkpoint": [Resume(every=2, keep=1)], "max_steps": 6}
    long(tmp_path, **keys, stop_after=3).train()
    assert long(tmp_path, **keys).train().first_step == 3
    assert kept(tmp_path, {name: text for name, text in mine.items() if "step-00000001" not in name})
    assert [path.read_text() for path in tmp_path.rglob("todo")] == ["mine: step-00000001/todo"]


def test_a_recipe_of_the_users_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("type: sft")
    for resume in ("auto", "never", "force"):
        with pytest.raises(CheckpointError, match=r"recipe.yaml was not written by a run.*another output_dir"):
            long(tmp_path, resume=resume).train()
    assert (tmp_path / "recipe.yaml").read_text() == "type: sft"


# -- going on with something else --------------------------------------------------------


def test_what_the_recipe_changed_wins_over_the_checkpoint_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys: dict[str, Any] = {"scheduler": Linear(), "model": {}}
    long(tmp_path, **keys, optimizer=AdamW(lr=1e-3, weight_decay=0.1), stop_after=4).train()
    changed = long(tmp_path, **keys, optimizer=AdamW(lr=1e-5, weight_decay=0.1), resume="force")
    run = changed.train()
    rates = [line["lr"] for line in metrics(tmp_path)]
    factor = Linear().factor(STEPS)
    assert rates == pytest.approx([(1e-3 if step < 4 else 1e-5) * factor(step) for step in range(STEPS)])
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0.0]
    assert "after step 4 with a change: optimizer.lr: 0.001 there, 1e-05 here" in caplog.text


@pytest.mark.parametrize("change", ["scheduler", "max_steps", "betas"])
def test_a_changed_schedule_is_gone_on_with_as_if_it_had_been_there_from_the_start(tmp_path: Path, change: str) -> None:
    before: dict[str, Any] = {"scheduler": Linear(), "optimizer": AdamW(lr=1e-3), "model": {}}
    after = {**before, "resume": "force", "max_steps": STEPS}
    after |= {
        "scheduler": {"scheduler": Cosine()}, "max_steps": {"max_steps": 20},
        "betas": {"optimizer": AdamW(lr=1e-3, betas=(0.5, 0.9))},
    }[change]  # fmt: skip
    long(tmp_path, **before, stop_after=4).train()
    run = long(tmp_path, **after).train()
    factor = after["scheduler"].factor(after["max_steps"])
    assert metrics(tmp_path)[-1]["lr"] == pytest.approx(1e-3 * factor(after["max_steps"] - 1))
    assert metrics(tmp_path)[4]["lr"] == pytest.approx(1e-3 * factor(4))
    assert tuple(run.optimizer.param_groups[0]["betas"]) == after["optimizer"].betas


def test_a_change_that_was_forced_once_stays_when_the_run_dies_before_it_is_saved(tmp_path: Path) -> None:
    long(tmp_path, stop_after=4).train()
    lower = {"optimizer": AdamW(lr=1e-6), "checkpoint": [Resume(every=None, at_end=False)]}
    long(tmp_path, **lower, stop_after=1, resume="force").train()
    long(tmp_path, optimizer=AdamW(lr=1e-6), stop_after=1).train()
    assert metrics(tmp_path)[4]["lr"] < 1e-5


def test_forcing_without_a_change_changes_no_bit(tmp_path: Path) -> None:
    whole = long(tmp_path / "whole").train()
    long(tmp_path / "cut", stop_after=5).train()
    assert_same_weights(whole, long(tmp_path / "cut", resume="force").train())


def sums_recipe(folder: Path, model: Path, rows: int = 24, **keys: Any) -> Any:
    """A recipe of files: data, a base model, code of one's own."""
    source = folder / "sums.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{n}+1=", "response": str(n + 1)}) + "\n" for n in range(rows)))
    return posttrain.SFTTrainer(
        model=HFModel(name_or_path=str(model)), data=SFTData(sources=[str(source)], max_length=64, **keys.pop("data", {})),
        output_dir=folder / "run", accelerator="cpu", logger=[JSONL()], max_steps=6, micro_batch_size=2,
        checkpoint=[Resume()], **keys,
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("part", ["data", "weights", "code"])
def test_other_rows_weights_or_code_under_the_same_name_are_refused_and_shown(
    tmp_path: Path, tiny_model: Path, part: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, code = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "my_blocks.py"
    code.write_text("A = 1\n")
    keys: dict[str, Any] = {"code": [code]}

    def made(rows: int = 24, **more: Any) -> Any:
        trainer = sums_recipe(tmp_path, model, rows, **keys, **more)
        sources = [attrs.evolve(source, stream=stream) for source in trainer.data.sources]
        return attrs.evolve(trainer, data=attrs.evolve(trainer.data, sources=sources))

    made(stop_after=2).train()
    assert made(stop_after=1).train().first_step == 2
    rows = 24
    if part == "data":
        rows = 20
    elif part == "weights":
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    else:
        code.write_text("A = 2\n")
    there = {"data": r"data: 0 .*sums.jsonl: (rows|bytes) \d+, .* there, (rows|bytes) \d+", "weights": "weights: model: ",
             "code": "code: my_blocks.py: "}[part]  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"(?s)other data, weights or code:\s+{there}.*resume=force"):
        made(rows).train()
    assert made(rows, resume="force").train().first_step == 3
    assert "after step 3 with a change" in caplog.text


def test_a_checkpoint_of_0_1_which_knows_neither_recipe_nor_data_is_gone_on_from(tmp_path: Path) -> None:
    whole = long(tmp_path / "whole").train()
    long(tmp_path / "cut", stop_after=4).train()
    found = checkpoints(tmp_path / "cut")[0]
    said = manifest.read(found)
    for name in ("seal", "recipe", "identity"):
        said.pop(name)
    (found / "manifest.json").write_text(json.dumps({**said, "seal": manifest.seal(said)}))
    assert_same_weights(whole, long(tmp_path / "cut").train())


def test_a_run_goes_back_to_a_checkpoint_that_is_named(tmp_path: Path) -> None:
    """Newer ones are set aside, nothing is removed; and the same command goes on from where it was cut."""
    resume = {"checkpoint": [Resume(every=3, keep=9)]}
    whole = long(tmp_path, **resume).train()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{n:08d}" for n in (12, 9, 6, 3)]
    cut = long(tmp_path, resume="step-6", stop_after=4, **resume).train()
    assert (cut.first_step, cut.step) == (6, 10)
    assert {path.name for path in tmp_path.glob("left-*")} == {"left-step-9", "left-step-12"}
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{n:08d}" for n in (10, 9, 6, 3)]
    again = long(tmp_path, resume="step-6", **resume).train()
    assert (again.first_step, again.step) == (10, 12)
    assert_same_weights(whole, again)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint step-7 in .* \(there: step-3, step-6, step-9"):
        long(tmp_path, resume="step-7", **resume).train()
    with pytest.raises(ValueError, match="a checkpoint such as step-300, not 'atuo'; did you mean 'auto'"):
        long(tmp_path, resume="atuo")
