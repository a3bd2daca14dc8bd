"""The demonstration of images from end to end, made small: few pictures, few steps."""

from pathlib import Path

import numpy as np
import pytest

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


def test_figures_are_drawn_as_they_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    import random

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
