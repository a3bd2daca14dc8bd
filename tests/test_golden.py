"""Ten steps of every trainer, seeded: a change that moves what they compute is seen.

`python tests/test_golden.py` writes the curves anew; say in the commit why they moved.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_distill import distill
from test_strategies import TRAINERS
from toy import metrics, trainer

FILE = Path(__file__).parent / "golden.json"
STEPS = 10
CASES = ["distill", *(case for case in TRAINERS if "saving" not in case)]


def curves(case: str, folder: Path) -> dict[str, list[float]]:
    """Train one case, and return its loss and gradient norm at every step."""
    keys: dict[str, Any] = {"max_steps": STEPS, "max_grad_norm": 1.0}
    made = distill(folder, **keys) if case == "distill" else trainer(folder, **keys, **TRAINERS[case])
    made.train()
    return {name: [line[name] for line in metrics(folder)] for name in ("loss", "grad_norm")}


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_as_it_was(case: str, tmp_path: Path) -> None:
    """Within what processors may differ by: the order in which they add up."""
    expected, found = json.loads(FILE.read_text())[case], curves(case, tmp_path)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-5, abs=1e-7), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written = {case: curves(case, Path(folder) / case) for case in CASES}
    FILE.write_text(json.dumps(written, indent=1) + "\n")
    sys.stdout.write(f"{FILE}\n")
