"""Ten steps of every trainer, seeded, and the file of what they gave.

`PYTHONPATH=. python tests/support/golden.py` writes the curves again; say in the commit why they moved.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from strategies import TRAINERS, distill
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written = {case: curves(case, Path(folder) / case) for case in CASES}
    FILE.write_text(json.dumps(written, indent=1) + "\n")
    sys.stdout.write(f"{FILE}\n")
