"""Generation while training: the data of a pass come from the weights at its beginning, whatever cut the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import on_two_ranks
from toy import losses, metrics

from posttrain import AdamW, DPOTrainer, HFModel, PreferenceData, RecipeError, Resume, Source
from posttrain.blocks.loggers.logger import JSONL
from posttrain.errors import TrainingError
from posttrain.synth import Filter, Generate, Pair, Refresh, Verify, verifier


@verifier("test-even")
def even(answer: str, row: dict[str, Any]) -> bool:
    """Whatever a random model says, about half of it is right."""
    return len(answer) % 2 == 0


STEPS = [Generate(n=4, body={"max_tokens": 6}), Verify(function="test-even"), Pair(strategy="all")]


def on_policy(folder: Path, model: Path, **keys: Any) -> DPOTrainer:
    """Two pairs at first, then what the model answers to three prompts."""
    data = folder.parent / "data"
    if not data.exists():
        data.mkdir()
        pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
        (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
        (data / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(3)))
    refresh = Refresh(source=Source(name_or_path=str(data / "prompts.jsonl")), steps=STEPS, batch_size=5)
    made: dict[str, Any] = {
        "model": HFModel(name_or_path=str(model)), "optimizer": AdamW(lr=1e-3), "max_steps": 9, "micro_batch_size": 2,
        "data": PreferenceData(sources=[str(data / "pairs.jsonl")], max_length=64, packing=False),
        "checkpoint": [Resume(every=1, keep=20)], "logger": [JSONL()], "callbacks": [refresh],
        "accelerator": "cpu", "devices": 1, "log_every": 1, "output_dir": folder,
    }  # fmt: skip
    return DPOTrainer(**made | keys)


def rows(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "refresh").glob("pass-*.jsonl"))}


def test_each_pass_trains_on_what_the_weights_answer(tmp_path: Path, tiny_model: Path) -> None:
    run = on_policy(tmp_path / "run", tiny_model).train()
    made = rows(tmp_path / "run")
    assert len(made) >= 2
    assert len(set(made.values())) == len(made)  # other weights, other answers
    counts = [int(m["refresh/rows"]) for m in metrics(tmp_path / "run") if "refresh/rows" in m]
    assert counts == [content.count(b"\n") for content in made.values()]
    assert run.loaders.train.rows(1) == counts[-1]
    assert run.memory == {}


def test_a_run_in_pieces_answers_and_learns_the_same(tmp_path: Path, tiny_model: Path) -> None:
    on_policy(tmp_path / "whole", tiny_model).train()
    for piece in (1, 1, 2, 3):
        on_policy(tmp_path / "cut", tiny_model, stop_after=piece).train()
    on_policy(tmp_path / "cut", tiny_model).train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    # Lost after the last step of a pass and before its checkpoint: the step is taken again, and so are the answers.
    folder = tmp_path / "cut"
    for saved in folder.glob("step-*"):
        if int(saved.name.removeprefix("step-")) > 1:
            shutil.rmtree(saved)
    shutil.rmtree(folder / "refresh")
    (folder / "refresh").mkdir()
    on_policy(folder, tiny_model, stop_after=2).train()
    assert rows(folder)["pass-1.jsonl"] == rows(tmp_path / "whole")["pass-1.jsonl"]


def test_a_run_begun_anew_forgets_the_answers(tmp_path: Path, tiny_model: Path) -> None:
    on_policy(tmp_path / "run", tiny_model).train()
    on_policy(tmp_path / "run", tiny_model, resume="never", max_steps=1, stop_after=1).train()
    assert rows(tmp_path / "run") == {}


def test_what_cannot_be_refreshed_is_said(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="precompute_reference"):
        on_policy(tmp_path / "run", tiny_model, precompute_reference=True).train()
    prompts = Source(name_or_path=str(tmp_path / "data" / "prompts.jsonl"))
    nothing = Refresh(source=prompts, steps=[STEPS[0], Filter(column="finish_reason", equals="never")])
    with pytest.raises(TrainingError, match="nothing came of the prompts after pass 1: .*finish_reason is not never"):
        on_policy(tmp_path / "other", tiny_model, callbacks=[nothing]).train()


@pytest.mark.slow
def test_two_ranks_train_on_the_answers_of_the_first(tmp_path: Path, tiny_model: Path) -> None:
    on_policy(tmp_path / "alone", tiny_model, max_steps=3)  # makes the data
    on_two_ranks(
        tmp_path, "test_synth_refresh",
        f"on_policy(folder, Path({str(tiny_model)!r}), devices=2, micro_batch_size=1).train()",
    )  # fmt: skip
    on_policy(tmp_path / "alone", tiny_model).train()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert len(rows(tmp_path / "two")) == len(rows(tmp_path / "alone"))
