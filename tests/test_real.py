"""A real pretrained model, fetched by pip: it answers, it is proven, it learns. Slow, and skipped where pip finds nothing."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct."""
    pytest.importorskip("gguf")
    fetched = subprocess.run(
        [sys.executable, str(EXAMPLES / "smollm2.py")], capture_output=True, text=True, check=False
    )  # fmt: skip
    if fetched.returncode:
        pytest.skip(f"the model could not be fetched: {fetched.stderr[-300:]}")
    return Path(fetched.stdout.split()[-1])


def test_it_says_what_the_capital_of_france_is(real: Path) -> None:
    from posttrain.blocks.models.exports import open_model
    from posttrain.tools.afterwards.chat import Talk

    conversation = Talk(open_model(str(real)), max_new_tokens=20, temperature=0)
    assert "Paris" in conversation.say("What is the capital of France?")
    assert "Rome" in conversation.say("And of Italy?")  # it knows what was asked before


def script(name: str) -> Any:
    """A script of examples/real: by its path, since other examples have a `make_data` too."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "real" / f"{name}.py")))


def test_it_learns_and_every_proof_holds(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe of `make demo-real` on fewer rows: the loss falls at once, and held-out messages are read better."""
    from posttrain.cli import main
    from posttrain.tools.afterwards.evaluate import compare, evaluate

    script("make_data").write(tmp_path, train=48, held_out=8)
    where = [f"model.name_or_path={real}", f"data.sources.0={tmp_path}/train.jsonl", f"output_dir={tmp_path}/run"]
    recipe = str(EXAMPLES / "real" / "recipe.yaml")
    assert main(["check", recipe, "--twin", *where]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert main(["train", recipe, *where]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.3 * losses[0]
    checks = script("checks")
    before, after = (
        evaluate(
            str(model), tmp_path / "held.jsonl", checks.same_json, max_new_tokens=60, output_dir=tmp_path / "evals"
        )
        for model in (real, tmp_path / "run")
    )
    found = compare(before, after)
    assert (before.right.value, found.worse) == (0, 0)
    assert found.better >= 2
