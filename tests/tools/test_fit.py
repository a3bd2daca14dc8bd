"""`posttrain fit`: the smallest change of a recipe that fits, and nothing more."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from ranks import recipe
from toy import losses, trainer

import posttrain
from posttrain.cli import main
from posttrain.recipes.load import load
from posttrain.tools import plan


def total(file: Path, changes: list[str]) -> int:
    return plan.estimate(load(file, changes), 1).total


def fit(file: Path, room: float, *options: str, capsys: Any) -> tuple[int, list[str], str]:
    """Return the exit code, the overrides that were proposed, and what was printed."""
    code = main(["fit", str(file), "--gpu-memory", repr(room / 0.9 / 2**30), *options])
    said = capsys.readouterr().out
    line = said.strip().splitlines()[-1]
    found = shlex.split(line)[3:] if line.startswith("posttrain train") else []
    return code, found, said


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path, sums: Path) -> Path:
    return recipe(tmp_path, tiny_model, sums, micro_batch_size=4)


def test_a_recipe_that_fits_is_left_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, said = fit(file, total(file, []), capsys=capsys)
    assert (code, found) == (0, [])
    assert "as it is" in said.splitlines()[-1]


@pytest.mark.parametrize("name", ["micro_batch_size", "model.activation_checkpointing", "strategy"])
def test_what_is_proposed_fits_and_no_part_of_it_can_be_left_out(
    name: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["micro_batch_size=1", "gradient_accumulation_steps=4"]
    ways = {
        "micro_batch_size": ["micro_batch_size=2", "gradient_accumulation_steps=2"],
        "model.activation_checkpointing": [*small, "model.activation_checkpointing=true"],
        "strategy": [*small, "model.activation_checkpointing=true", "strategy={type: fsdp, cpu_offload: true}"],
    }
    room = total(file, ways[name])
    code, found, _ = fit(file, room, capsys=capsys)
    assert code == 0
    assert total(file, found) <= room
    assert any(override.startswith(name) for override in found)
    pairs = [found[:2], *([one] for one in found[2:])]  # rows and their groups go together
    for part in pairs:
        assert total(file, [one for one in found if one not in part]) > room


def test_without_offload_the_base_becomes_smaller(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    small = ["micro_batch_size=1", "gradient_accumulation_steps=4", "model.activation_checkpointing=true"]
    quantized = [*small, "model.lora={}", "model.dtype=bfloat16", "model.quantize=nf4"]
    code, found, _ = fit(file, total(file, quantized), "--no-offload", capsys=capsys)
    assert code == 0
    assert "model.quantize=nf4" in found
    assert not any("offload" in override for override in found)


def test_what_cannot_fit_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, said = fit(file, 1000.0, capsys=capsys)
    assert (code, found) == (1, [])
    assert "nothing that was tried fits" in said


def test_offload_trains_on_one_device(tmp_path: Path) -> None:
    """What is proposed for one device runs on one, with the same steps."""
    trainer(tmp_path / "plain", max_steps=3).train()
    trainer(tmp_path / "offload", max_steps=3, strategy=posttrain.FSDP(cpu_offload=True), devices=1).train()
    assert losses(tmp_path / "offload") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
