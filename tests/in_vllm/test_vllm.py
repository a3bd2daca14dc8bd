"""What we export, served by an unmodified vLLM on the CPU: the same words as ours, and the work that was promised."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS = 5 + 17 + 64 + 120 + 33 + 40
NEW, PROMPTS = 24, 6
OVER_ALL = ROWS + PROMPTS * (NEW - 1)
"""Rows that go through a layer: every prompt, and every new token but the last."""
SAMPLED = PROMPTS * NEW
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
}  # fmt: skip


def run(tmp_path: Path, given: Any) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).parent / "cases.py"), str(tmp_path), json.dumps(given)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, **SETTINGS}, cwd=tmp_path
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def case(tmp_path: Path, **given: Any) -> dict[str, Any]:
    return run(tmp_path, {"group": None, "drafts": None, "fast": False, "chunk": None, **given})


def test_a_plain_model_says_in_vllm_what_it_says_in_transformers(tmp_path: Path) -> None:
    assert case(tmp_path)["equal"]


BLOCKS = 170
"""Of keys and values that fit into 64 MiB with 6 slots."""


@pytest.mark.parametrize(("group", "slots"), [(1, 6), (2, 4), (4, 3)])
def test_swiftkv_exits_early_and_shares_keys_and_values(tmp_path: Path, group: int, slots: int) -> None:
    found = case(tmp_path, group=group, fast=True)
    assert found["equal"]
    assert found["upper_rows"] == SAMPLED
    assert found["blocks"] == pytest.approx(BLOCKS * 6 / slots, abs=1.5)


def test_without_fast_prefill_every_row_goes_through_all_layers(tmp_path: Path) -> None:
    found = case(tmp_path, group=2)
    assert found["equal"]
    assert found["upper_rows"] == OVER_ALL


def test_prompts_may_come_in_chunks(tmp_path: Path) -> None:
    found = case(tmp_path, group=2, fast=True, chunk=16)
    assert found["equal"]
    assert SAMPLED <= found["upper_rows"] < OVER_ALL - ROWS / 2


@pytest.mark.parametrize("drafts", [2, 3])
def test_drafts_change_nothing_and_are_accepted_as_in_our_own_simulation(tmp_path: Path, drafts: int) -> None:
    found = case(tmp_path, drafts=drafts)
    assert found["equal"]
    assert found["theirs"] == found["ours"]
    assert found["ours"][1][-1] > 5  # some are accepted by the last head


def test_a_speculator_drafts_for_a_swiftkv_model(tmp_path: Path) -> None:
    found = case(tmp_path, group=2, drafts=3, fast=True)
    assert found["equal"]
    assert found["theirs"] == found["ours"]


def test_a_reward_model_scores_as_in_transformers(tmp_path: Path) -> None:
    found = run(tmp_path, "reward")
    assert found["theirs"] == pytest.approx(found["ours"], abs=1e-4)
