"""The demo from end to end, made small: few chats, few steps."""

import json
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo"


def test_the_demo_leaves_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.chdir(tmp_path)
    import demo
    import make_data

    make_data.make(Path("runs/demo/data"), train=600, test=12)
    monkeypatch.setattr(demo.console, "_width", 160)
    demo.main(["max_steps=4", "eval_every=2", "log_every=2", "accelerator=cpu"])

    folder = Path("runs/demo/run")
    for name in ("recipe.yaml", "ledger.json", "metrics.jsonl", "huggingface/model.safetensors", "tensorboard"):
        assert (folder / name).exists(), name
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "eval_loss" in lines[-1]
    shown = capsys.readouterr().out
    assert "Spell python backwards." in shown
    assert "exactly right" in shown
    assert "of 30" in shown


def test_the_demo_asks_nothing_that_it_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    import make_data

    make_data.make(tmp_path, train=20_000, test=100)
    train, test = (
        [make_data.question_of(json.loads(line)) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    assert len(test) == len(set(test)) > 100
    assert not set(train) & set(test)
    assert len(train) < 20_000, "nothing was held out"
