"""Ten steps of every trainer, seeded: a change that moves what they compute is seen (support/golden.py)."""

import json
from pathlib import Path

import pytest
from golden import CASES, FILE, curves


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_as_it_was(case: str, tmp_path: Path) -> None:
    """Within what processors may differ by: the order in which they add up."""
    expected, found = json.loads(FILE.read_text())[case], curves(case, tmp_path)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-5, abs=1e-7), name
