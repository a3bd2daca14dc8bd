"""The demonstration of images from end to end, made small: few pictures, few steps."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain

DEMO = Path(__file__).parent.parent.parent / "examples" / "vision"


def test_the_demo_of_images_leaves_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.chdir(tmp_path)
    import figures
    import learn_to_see as demo

    figures.make(Path("runs/vision/data"), train=120, test=24)
    monkeypatch.setattr(demo.console, "_width", 160)
    totals = demo.main(["max_steps=3", "log_every=1", "accelerator=cpu"])
    assert len(totals) == 3
    assert Path("runs/vision/answers.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "tower frozen at random" in shown
    assert "all trained" in shown
    for name in ("run", "frozen", "untrained"):
        assert (Path("runs/vision") / name / "huggingface" / "processor_config.json").exists()


@pytest.mark.slow
def test_the_demo_of_rewards_goes_on_from_a_model_that_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.chdir(tmp_path)
    import figures
    import learn_from_rewards as demo

    figures.make(Path("runs/vision/data"), train=120, test=24)
    monkeypatch.setattr(demo.seeing.console, "_width", 160)
    short = ["max_steps=2", "log_every=1", "accelerator=cpu"]
    totals = demo.main(short, [*short, "eval_every=2", "micro_batch_size=4"], pictures=40)
    assert len(totals) == 2
    assert "and from rewards" in capsys.readouterr().out
    (line, *_) = Path("runs/vision/rewards/rollouts.jsonl").read_text().splitlines()
    assert len(line) < 20_000, "pixels are written down"
    assert len(json.loads(line)["images"]) == 1


def test_figures_are_drawn_as_they_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    import figures

    for seed in range(40):
        drawn, there = figures.draw(random.Random(seed))
        for color, _, place in there:
            column, row = figures.PLACES[place]
            cell = drawn.crop((12 * column, 12 * row, 12 * column + 12, 12 * row + 12))
            wanted = figures.COLORS[color]
            near = np.abs(np.asarray(cell, dtype=int).reshape(-1, 3) - wanted).sum(1).min()
            assert near <= 75
        held = dict(figures.questions(random.Random(seed), there))
        assert held["how many figures are there ?"] == figures.NUMBERS[len(there) - 1]


@pytest.mark.slow
def test_dpo_on_right_and_wrong_answers_about_pictures_is_right_about_held_out_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.chdir(tmp_path)
    import figures
    import learn_to_see as demo

    figures.make(demo.FOLDER / "data", train=4000, test=400)
    demo.train(["max_steps=300", "accelerator=cpu"])
    for name, seed, count in (("train", 3, 3000), ("test", 4, 600)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, wrong_and_right(figures.rows(seed, count), seed))))
    recipe = {
        "type": "dpo", "accelerator": "cpu", "output_dir": "dpo", "checkpoint": [{"type": "huggingface"}],
        "model": {"name_or_path": str(demo.FOLDER / "run" / "huggingface"), "train": ["language", "projector", "tower"]},
        "data": {"sources": ["train.jsonl"], "eval_sources": ["test.jsonl"], "max_length": 128},
        "beta": 1.0, "loss_type": {"sigmoid": 1, "sft": 0.2},  # without sft, right answers lose likelihood too
        "optimizer": {"lr": 1e-3}, "micro_batch_size": 8, "max_steps": 80, "eval_every": 80, "log_every": 1,
        "logger": ["jsonl"],
    }  # fmt: skip
    Path("dpo.yaml").write_text(json.dumps(recipe))
    posttrain.load("dpo.yaml").train()
    lines = [json.loads(line) for line in Path("dpo/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["rewards/margin"] == pytest.approx(0, abs=1e-3), "the first step does not begin at the reference"
    assert lines[-1]["eval_rewards/margin"] > 1
    assert lines[-1]["eval_rewards/accuracy"] > 0.7, "without a look at the picture no more than 0.5 are right"
    asked = [one for one in demo.questions(400) if not one["question"].startswith("how many")]
    folders = (demo.FOLDER / "run", Path("dpo"))
    before, after = (demo.shares(asked, demo.answers(folder / "huggingface", asked))[-1] for folder in folders)
    assert after > before


def wrong_and_right(rows: Iterator[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """A question about the color, shape or place of a figure, with its answer and another, each as likely as any."""
    import figures

    rng = random.Random(seed)
    kinds = (
        tuple(figures.COLORS),
        figures.SHAPES,
        tuple(figures.PLACES),
    )  # not numbers: one is said more often than two
    for row in rows:
        question, right = row["messages"][:2]
        others = [a for kind in kinds if right["content"] in kind for a in kind if a != right["content"]]
        if others:
            wrong = {"role": "assistant", "content": rng.choice(others)}
            yield {"prompt": [question], "chosen": [right], "rejected": [wrong]}
