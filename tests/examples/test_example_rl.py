"""The demo of reinforcement learning from end to end, made small: a tiny random model, few sums, few steps."""

import json
from pathlib import Path

import pytest

RL = Path(__file__).parent.parent.parent / "examples" / "rl"


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


def test_the_calculator_is_called_and_what_it_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RL / "tools"))
    import calculator

    assert calculator.calculator("12 * (3 + 4) / 2 - 1") == "41"
    for bad in ("__import__('os')", "2 ** 9", "a + 1", "f(1)"):
        with pytest.raises(ValueError, match="only numbers"):
            calculator.calculator(bad)
    calculator.make(tmp_path, test=5)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    asked = {row["messages"][-1]["content"] for row in train}
    assert len(rows) == 5
    assert not asked & {row["messages"][-1]["content"] for row in rows}
    assert calculator.product("", f" {rows[0]['answer']}.", rows[0])
    assert not calculator.product("", f"{rows[0]['answer']} or so", rows[0])


@pytest.mark.parametrize("name", ["tools", "agent"])
def test_the_recipes_with_a_calculator_train(
    name: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import posttrain

    monkeypatch.syspath_prepend(str(RL / "tools"))
    monkeypatch.chdir(tmp_path)
    import calculator

    calculator.make(Path("runs/demo-tools/data"), test=2)
    small = ["max_steps=1", "micro_batch_size=1", "group_size=2", "data.max_length=900", "sampler.max_new_tokens=4"]
    small += [f"model.name_or_path={tiny_model}", "environment.max_turns=2", "environment.max_tokens=2000"]
    last = posttrain.load(RL / name / "recipe.yaml", small).train().last
    assert last["turns"] >= 1.0
    assert last["sampler/gap"] < 1e-5
    assert (Path(f"runs/demo-{name}/run") / "huggingface" / "model.safetensors").exists()
