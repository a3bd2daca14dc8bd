"""Saving memory for activations changes no result, and does save it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ROWS
from compare import assert_same_run
from test_router import model
from toy import network, trainer

from posttrain.batch import Batch
from posttrain.blocks.layout import lay
from posttrain.blocks.models.activations import Offload, layers_of
from posttrain.blocks.models.model import HFModel
from posttrain.errors import RecipeError
from posttrain.tools.tracing import Alive
from posttrain.trainers.dpo import DPOTrainer
from posttrain.trainers.swiftkv import SwiftKVTrainer

WAYS: dict[str, dict[str, Any]] = {
    "full": {"activation_checkpointing": True},
    "selective": {"activation_checkpointing": "selective"},
    "offloaded": {"activation_checkpointing": True, "offload_activations": True},
    "tiled": {"tiled_mlp": 3},
    "tiled, full": {"tiled_mlp": 3, "activation_checkpointing": True, "offload_activations": True},
}
WIDE = {"hidden_size": 32, "intermediate_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 4096}


@pytest.fixture
def moved_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy small tensors of the CPU, too."""
    init = Offload.__init__
    monkeypatch.setattr(Offload, "__init__", lambda self: init(self, anywhere=True))


@pytest.mark.usefixtures("moved_anywhere")
@pytest.mark.parametrize("method", [None, DPOTrainer, SwiftKVTrainer])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_save_memory_changes_what_is_learned(tmp_path: Path, way: str, method: Any) -> None:
    keys: dict[str, Any] = {"max_steps": 3} | ({"method": method} if method else {})
    deep = {"config": {"num_hidden_layers": 5}, "num_key_value_layers": 1, "key_value_group_size": 2}
    model = deep if method is SwiftKVTrainer else {}
    plain = trainer(tmp_path / "plain", **keys, model=model).train()
    assert plain.last["grad_norm"] > 0
    assert_same_run(plain, trainer(tmp_path / "saving", **keys, model=model | WAYS[way]).train())


def held(way: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes that wait for the backward pass, and the most that are alive at any time."""
    torch.manual_seed(0)
    model = network(HFModel, config=WIDE, **way).build(None)
    with Alive() as alive:
        loss = model(batch())
        waiting = alive.now
        loss.backward()
    return waiting, alive.peak


def batch() -> Batch:
    """One document of a thousand tokens, of which the last is supervised."""
    import numpy as np

    ids = np.arange(1000) % 90 + 3
    return lay([[(ids, np.arange(1000) == 999)]], pad_id=0)


def test_each_way_keeps_less_than_the_one_before() -> None:
    plain, selective, full = (held(way)[0] for way in ({}, WAYS["selective"], WAYS["full"]))
    assert plain > 1.5 * selective > 3 * full


def test_full_checkpointing_keeps_one_input_for_each_layer() -> None:
    inputs = 4 * 1000 * 32 * 4
    assert inputs < held(WAYS["full"])[0] < 2.5 * inputs  # and what lies outside of the layers


def test_tiles_bound_the_peak_of_an_mlp() -> None:
    full, tiled = (held({**WAYS["full"], "tiled_mlp": tiles})[1] for tiles in (None, 20))
    one = 1000 * 512 * 4  # an intermediate activation of the whole row
    assert full > 3 * one
    assert tiled < full - 2 * one


def test_offloading_needs_something_to_offload() -> None:
    with pytest.raises(RecipeError, match="activation_checkpointing"):
        trainer(Path("unused"), model={"offload_activations": True}).train()


@pytest.mark.parametrize("kind", ["gpt2", "falcon", "mpt", "gpt_neox", "opt", "mamba", "gemma3"])
def test_layers_are_found_whatever_a_decoder_calls_them(kind: str) -> None:
    """And computing them again changes no gradient."""
    found = []
    for way in ({}, WAYS["full"]):
        torch.manual_seed(0)
        net: Any = model(kind, router_aux_loss=None, **way).build(None)  # type: ignore[arg-type]
        layers = layers_of(net.base)
        assert len(layers) == net.base.config.get_text_config().num_hidden_layers
        net.train()(lay(ROWS, 0)).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
