"""Noise of embeddings (NEFTune): how much, when, and that nothing of it stays."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import losses, trainer

import posttrain
from posttrain.errors import RecipeError
from posttrain.trainers.dpo import DPOTrainer


@pytest.mark.parametrize("method", [posttrain.SFTTrainer, DPOTrainer])
def test_noise_is_bounded_by_the_length_of_each_document(method: Any, tmp_path: Path) -> None:
    """Within alpha / sqrt(L d), and near it, of each document of a packed row; pairs share what they begin with."""
    made = trainer(tmp_path, method=method, max_steps=1)
    made.train()
    run, noise = made.run, posttrain.NEFTune(alpha=5.0)
    network, batch = run.model.module, run.batches[0]
    embeddings, outputs = network.base.get_input_embeddings(), list[torch.Tensor]()
    embeddings.register_forward_hook(lambda module, ids, output: outputs.append(output.detach()))
    noise.start(made)
    embeddings.register_forward_hook(lambda module, ids, output: outputs.append(output.detach()))
    network.train()(batch, "log_probs")
    added = (outputs[1] - outputs[0]).abs()
    layout = network.layout(batch)
    keys = layout.cu_seqlens if layout.cu_seqlens_k is None else layout.cu_seqlens_k
    at = layout.cu_seqlens.tolist()
    for begin, end, length in zip(at, at[1:], keys.diff().tolist(), strict=False):
        of_document, bound = added.flatten(0, 1)[begin:end], 5.0 / math.sqrt(length * 32)
        assert 0.8 * bound < float(of_document.max()) <= bound
    network.eval()(batch, "log_probs")
    assert torch.equal(outputs[2], outputs[3])  # not while evaluating
    noise.end(made, None)
    network.train()(batch, "log_probs")
    assert torch.equal(outputs[4], outputs[5])
    assert "running" not in vars(network)


def test_a_noisy_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"callbacks": [posttrain.NEFTune()], "max_steps": 4, "eval_rows": 5, "eval_every": 2}
    trainer(tmp_path / "whole", **keys).train()
    trainer(tmp_path / "cut", **keys, stop_after=2).train()
    trainer(tmp_path / "cut", **keys).train()
    trainer(tmp_path / "plain", **{**keys, "callbacks": []}).train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "whole")[0] != losses(tmp_path / "plain")[0]


def test_rows_that_ranks_share_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.sequence = posttrain.Ulysses(size=2)
    with pytest.raises(RecipeError, match="neftune needs"):
        posttrain.NEFTune().start(made)
