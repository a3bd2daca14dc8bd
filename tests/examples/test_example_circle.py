"""The whole circle, as its README says: a model gets better by its own answers, checked and paired."""

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.recipes import load as recipe
from posttrain.synth.pipelines import recipe as synth_recipe

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "circle"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIRCLE_KEY", "not-needed")
    return runpy.run_path(str(EXAMPLE / "run.py"))


def test_no_question_is_in_the_test_and_the_recipes_are_valid(example: dict[str, Any]) -> None:
    example["questions"](40, 1)
    asked = Path("runs/circle/data/questions.jsonl").read_text().splitlines()
    assert len(asked) > 20
    assert not any(question in line for question, _ in example["test"]() for line in asked)
    assert synth_recipe.load(EXAMPLE / "synth.yaml", []).pipeline.steps
    Path("runs/circle/data/pairs.jsonl").write_text("{}\n")
    Path("runs/circle/sft/huggingface").mkdir(parents=True)  # what the steps before leave
    for name in ("dpo.yaml", "online.yaml"):
        assert recipe.load(EXAMPLE / name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_learns_from_its_own_answers(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shutil.which("transformers", path=str(Path(sys.executable).parent))
    found = example["main"]([])
    assert found["after DPO"] > found["after SFT"] + 0.05  # 17 points when it was measured; an error is 2.5
