"""When two runs are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import losses, metrics


def assert_same_run(one: Any, other: Any) -> None:
    """Losses within 1e-6 and parameters within 1e-5, as the invariance contract says."""
    ours, theirs = losses(one.output_dir), losses(other.output_dir)
    assert ours == pytest.approx(theirs, abs=1e-6, rel=0)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def assert_same_metrics(one: Path, other: Path) -> None:
    """All that two runs logged, but what depends on the machine."""
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, abs=2e-6, rel=1e-5)


def near(one: list[dict[str, float]], other: list[dict[str, float]], name: str) -> None:
    assert len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys(), name
        for key, value in ours.items():
            assert value == pytest.approx(theirs[key], abs=2e-6, rel=2e-5), f"{name}: {key}"
