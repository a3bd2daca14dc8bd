"""The small recipes of the gallery run, one after the other, as their script runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "small"


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_small_recipe_trains(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "run.py"), "max_steps=2", "eval_every=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    recipes = {file.stem for file in EXAMPLE.glob("*.yaml")}
    for name in recipes:
        assert (tmp_path / "runs" / "small" / name / "metrics.jsonl").exists(), f"{name} is not among RECIPES"
        assert f"  {name} " in done.stdout
    assert (tmp_path / "runs" / "small" / "curves.png").exists()
