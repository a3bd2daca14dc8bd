"""A tiny network of every kind of architecture, of ours and of transformers, and rows for them."""

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents import probe
from posttrain.blocks.models.documents.tiny import tiny

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [3.0] * 48, "short_factor": [1.0] * 48,
    "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "packed attention"),
    "llama dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "RotaryEmbedding",
    ),
    "phi3 longrope": ({"rope_parameters": LONGROPE}, "RotaryEmbedding"),
    "qwen3": ({}, "packed attention"),
    "gemma3_text": ({}, "packed attention"),
    "mixtral": ({}, "packed attention"),
    "afmoe": ({}, "packed attention"),  # a parameter that is never trained
    "gpt_oss": ({}, "packed attention"),  # attention sinks, windows
    "gemma2": ({}, "packed attention"),  # soft caps
    "llama4_text": ({}, "packed attention"),  # chunks
    "deepseek_v3": ({}, "packed attention"),  # latent attention: heads of two sizes
    "falcon": ({}, "FalconAttention by document"),
    "stablelm": ({}, "sdpa attention"),  # ours would be by document
    "bloom": ({}, "row of its own"),
    "mamba": ({}, "MambaMixer by document"),
    "mamba2": ({"chunk_size": 16}, "Mamba2Mixer by document"),  # documents of less, of one and of some chunks
    "jamba": ({}, "JambaMambaMixer by document"),
    "qwen3_next": ({}, "Qwen3NextGatedDeltaNet by document"),
    "qwen3_5_text": ({}, "Qwen3_5GatedDeltaNet by document"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 16}, "ShortConv by document"),
    "granitemoehybrid": ({}, "GraniteMoeHybridMambaLayer by document"),
    "nemotron_h": ({}, "NemotronHMamba2Mixer by document"),
    "minimax": ({}, "MiniMaxLightningAttention by document"),
}
"""Name -> changes to its configuration, and how its documents are kept apart."""


def config_of(kind: str) -> Any:
    changes, _ = KINDS[kind]
    return tiny(AutoConfig.for_model(kind.split()[0], **changes), vocabulary=97, window=8)


def document(seed: int, length: int) -> Any:
    random = np.random.default_rng(seed)
    return random.integers(3, 97, length), random.random(length) < 0.8


ROWS = [[document(1, 21), document(2, 3), document(3, 30)], [document(4, 40)], [document(5, 2), document(6, 17)]]


def networks(kind: str) -> tuple[CausalLM, Any]:
    """Return a network of ours, and transformers' own with the same weights."""
    torch.manual_seed(0)
    config = config_of(kind)
    config.get_text_config().initializer_range = 0.06  # the delta rule is badly conditioned with larger weights
    with torch.random.fork_rng():
        theirs = probe.auto_of(config).from_config(config, dtype=torch.float32).eval()
    hf = copy.deepcopy(theirs)
    way = probe.find_way(config, kind, None)
    probe.set_attention(hf, way.attention)
    net = CausalLM(hf)
    net.keep_apart(way)
    return net.eval(), theirs


def alone(theirs: Any) -> torch.Tensor:
    """Return the summed loss of each document by itself."""
    total = torch.zeros(())
    for ids, mask in (document for row in ROWS for document in row):
        logits = theirs(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1].float()
        trained = torch.from_numpy(mask[1:])
        targets = torch.from_numpy(ids[1:])[trained]
        total = total + torch.nn.functional.cross_entropy(logits[trained], targets, reduction="sum")
    return total
