"""The DPO example: pairs from real solutions, and the whole chain, made small."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "dpo_gsm8k"
SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k_model_solutions.jsonl"

needs_data = pytest.mark.skipif(not SOLUTIONS.is_file(), reason=f"GSM8K's model solutions are not there: {SOLUTIONS}")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Import from the example's folder, and run in an empty one."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.chdir(tmp_path)


def solutions(**correct: bool) -> dict[str, Any]:
    """What the four models answered to a question: the text of each is its letter."""
    models = ("6b_finetuning", "175b_finetuning", "6b_verification", "175b_verification")
    written = {m: {"solution": text[0], "is_correct": c} for m, (text, c) in zip(models, correct.items(), strict=True)}
    return {"question": "Why?", **written}


@pytest.mark.usefixtures("example")
def test_pairs_are_made_of_different_solutions_and_what_is_left_out_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import make_pairs

    monkeypatch.setattr(make_pairs, "is_held_out", lambda question: False)
    rows = [
        solutions(a=True, b=False, c=True, d=False),
        solutions(a=True, b=False, a2=True, b2=False),
        solutions(a=True, b=True, c=True, d=True),
        solutions(a=False, b=False, c=False, d=False),
    ]
    (tmp_path / "solutions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = make_pairs.make(tmp_path / "solutions.jsonl", tmp_path / "data")
    assert counts["solutions left out: another model wrote the same"] == 2
    assert counts["questions without pairs: no solution is correct"] == 1
    assert counts["questions without pairs: no solution is wrong"] == 1
    pairs = make_pairs.read(tmp_path / "data" / "pairs_train.jsonl")
    assert [pair["chosen"] + pair["rejected"] for pair in pairs] == ["ab", "ad", "cb", "cd", "ab"]
    assert (pairs[1]["chosen_by"], pairs[1]["rejected_by"]) == ("6b_finetuning", "175b_verification")
    practice = make_pairs.read(tmp_path / "data" / "sft_train.jsonl")
    assert [row["response"] for row in practice] == ["a", "c", "a", "a", "b", "c", "d"]


@needs_data
@pytest.mark.usefixtures("example")
def test_no_held_out_question_is_trained_on(tmp_path: Path) -> None:
    import make_pairs

    counts = make_pairs.make(SOLUTIONS, tmp_path)
    train, test, practice = (
        make_pairs.read(tmp_path / f"{n}.jsonl") for n in ("pairs_train", "pairs_test", "sft_train")
    )
    held_out = {pair["prompt"] for pair in test}
    assert len(held_out) == counts["questions in pairs_test.jsonl"] > 100
    assert not held_out & {row["prompt"] for row in train + practice}

    truth: dict[str, dict[str, bool]] = {}
    rates = dict.fromkeys(make_pairs.MODELS, 0)
    for row in map(json.loads, SOLUTIONS.read_text().splitlines()):
        truth[row["question"]] = {row[m]["solution"].strip(): row[m]["is_correct"] for m in make_pairs.MODELS}
        for model in make_pairs.MODELS:
            rates[model] += row[model]["is_correct"]
    assert sorted(rates, key=rates.__getitem__) == list(make_pairs.MODELS), "not from the weakest to the strongest"
    for pair in train + test:
        assert truth[pair["prompt"]][pair["chosen"]] and not truth[pair["prompt"]][pair["rejected"]]
    assert all(truth[row["prompt"]][row["response"]] for row in practice)


@needs_data
@pytest.mark.usefixtures("example")
def test_dpo_after_sft_raises_the_margin_on_held_out_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import make_pairs
    import run

    monkeypatch.setattr(make_pairs, "HELD_OUT", range(8))
    monkeypatch.setattr(run.console, "_width", 120)
    small = ["accelerator=cpu", "data.max_length=256", "data.cache_dir=cache"]
    sft = ["sft.max_steps=20", "sft.model.config={hidden_size: 64, intermediate_size: 128}"]
    dpo = ["dpo.max_steps=30", "dpo.optimizer.lr=1e-3", "dpo.eval_every=30"]
    found = run.main(["--solutions", str(SOLUTIONS), *small, *sft, *dpo])

    folder = Path("runs/dpo_gsm8k/dpo")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = lines[-1]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the first loss is not that of the reference"
    assert evaluated["eval_rewards/margin"] > 0
    assert evaluated["eval_rewards/accuracy"] > 0.5
    for name, label in {  # plain transformers says the same
        "eval_loss": "loss", "eval_rewards/margin": "margin of rewards", "eval_rewards/accuracy": "accuracy of rewards",
        "eval_log_probs/chosen": "log-probability of correct ones",
        "eval_log_probs/rejected": "log-probability of wrong ones",
    }.items():  # fmt: skip
        assert evaluated[name] == pytest.approx(found[label].mean, rel=1e-3, abs=1e-3), name
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for text in ("rows in pairs_test.jsonl", "held-out pairs, by plain transformers", "the shorter one"):
        assert text in shown, text


@pytest.mark.usefixtures("example")
def test_without_the_data_the_example_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    import run

    with pytest.raises(SystemExit):
        run.main(["--solutions", "nowhere.jsonl"])
    assert "nowhere.jsonl is not there" in capsys.readouterr().err
