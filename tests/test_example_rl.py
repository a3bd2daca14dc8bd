"""The demo of reinforcement learning from end to end, made small: a tiny random model, few sums, few steps."""

import json
from pathlib import Path

import pytest

RL = Path(__file__).parent.parent / "examples" / "rl"


def test_the_demo_leaves_what_it_promises(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(RL))
    monkeypatch.chdir(tmp_path)
    import learn_to_add
    import sums

    sums.make(Path("runs/demo-rl/data"), test=6)
    monkeypatch.setattr(learn_to_add.console, "_width", 160)
    learn_to_add.main(
        [f"model.name_or_path={tiny_model}", "max_steps=2", "eval_every=1", "micro_batch_size=2", "group_size=2"]
    )
    folder = Path("runs/demo-rl/run")
    for name in ("recipe.yaml", "metrics.jsonl", "rollouts.jsonl", "huggingface/model.safetensors"):
        assert (folder / name).exists(), name
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [0] * 6 + [1] * 6 + [2] * 6
    assert all(len(line["replies"]) == 4 for line in evaluations)
    shown = capsys.readouterr().out
    assert "exactly right" in shown
    assert "of 6" in shown
    assert "from 8 replies" in shown


def test_no_sum_that_is_held_out_is_asked_nor_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RL))
    import sums

    sums.make(tmp_path)
    train, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    pairs = [[frozenset(row["prompt"].splitlines()[-1][:-1].split("+")) for row in rows] for rows in (train, test)]
    assert len(test) == len(set(pairs[1])) == 200
    assert not set(pairs[0]) & set(pairs[1])
    assert not {frozenset(("34", "12")), frozenset(("50", "21"))} & (set(pairs[0]) | set(pairs[1]))
    for row in (*train, *test):
        a, b = row["prompt"].splitlines()[-1][:-1].split("+")
        assert int(a) + int(b) == int(row["answer"])
