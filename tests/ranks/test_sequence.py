"""Rows that several ranks share: the parts are the whole, and what cannot be shared is refused before training.

That ranks then train like one is shown in test_strategies.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import recipe
from toy import document, network

import posttrain
from posttrain.blocks.layout import lay
from posttrain.cli import main
from posttrain.errors import RecipeError


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_hold_every_column_and_every_target_once(size: int) -> None:
    whole = lay([[document(1), document(2)], [document(3)]], pad_id=0, multiple=size)
    parts = [whole.columns(place, size, group=None) for place in range(size)]
    for name in ("input_ids", "labels", "position_ids"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts], dim=1), whole[name])
    found = [int(token) for part in parts for token in part["targets"]]
    assert sorted(found) == sorted(whole["targets"].tolist())
    for place, part in enumerate(parts):  # in the whole, a target is the label one column to the right
        width = part["input_ids"].shape[1]
        row, column, first = part["supervised"] // width, part["supervised"] % width, place * width
        torch.testing.assert_close(whole["labels"][row, first + column + 1], part["targets"])
    for name in ("weight", "tokens", "supervised_tokens"):
        assert sum(part[name] for part in parts) == whole[name]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "4 attention heads cannot be divided by 3"),
        ({"attn_implementation": "sdpa"}, "needs the attention `packed`"),
    ],
)
def test_a_network_that_cannot_be_shared_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        posttrain.Ulysses(size=3).validate(network(**keys).build(None))


def test_a_trainer_that_needs_whole_rows_is_refused_by_check(
    tmp_path: Path, tiny_model: Path, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(recipe(tmp_path, tiny_model, sums, sequence={"type": "ulysses", "size": 2}))
    assert main(["check", file]) == 0
    assert main(["check", file, "type=reward"]) == 2
    assert "sequence: RewardTrainer needs whole rows on a device" in capsys.readouterr().err
