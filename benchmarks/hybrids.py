"""What it costs to keep documents apart in recurrent layers: a step beside the packed form that leaks.

    python benchmarks/hybrids.py [--only qwen3_next lfm2] [--rows 2] [--width 1024] [--rounds 3] [--device cuda]

Forward and backward pass of four layers of each type, on rows of documents whose lengths are as skewed as those of chats
(lognormal, a median of 120 tokens). `leaking` is the same network whose recurrent layers go through the whole row; its
numbers are wrong. Tokens are padded where documents of unlike length share a batch; `padded` is how many more are
computed. Seconds of the CPU, one thread, medians of alternating rounds; with `--device cuda` of the clock.
"""

import argparse
import copy
import functools
import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from posttrain.blocks.layout import lay
from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents import probe
from posttrain.blocks.models.documents.ways import LAYOUT, Way, groups

TYPES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "qwen3_5_text": {},
    "mamba2": {"num_heads": 16, "head_dim": 32, "expand": 1, "n_groups": 1, "state_size": 64},
    "jamba": {"num_experts": 2, "mamba_dt_rank": 16, "mamba_d_state": 16},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "granitemoehybrid": {"mamba_n_heads": 16, "mamba_d_head": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
}
SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def rows(count: int, width: int, vocabulary: int) -> list[list[Any]]:
    """Return full rows of random documents."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        row, left = [], width
        while left:
            length = min(left, int(random.lognormal(4.8, 0.9)) + 8)
            row.append((random.integers(3, vocabulary, length), np.ones(length, dtype=bool)))
            left -= length
        made.append(row)
    return made


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", default=list(TYPES))
    for name, number in (("rows", 2), ("width", 1024), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| type | documents kept apart by | s | leaking, s | times | padded |\n|---|---|---|---|---|---|")
    for kind in chosen.only:
        config = AutoConfig.for_model(kind, **{**SIZES, **TYPES[kind]})
        way = probe.find_way(config, kind, None)
        torch.manual_seed(0)
        hf = probe.auto_of(config).from_config(config, dtype=torch.float32)
        probe.set_attention(hf, way.attention)
        batch = lay(rows(chosen.rows, chosen.width, config.vocab_size), 0)
        networks = []
        for one in (way, Way(way.attention)):
            network = CausalLM(copy.deepcopy(hf)).to(chosen.device).train()
            network.keep_apart(one)
            if one is not way:
                let_leak(network, way)
            networks.append(network)
        computed = sum(index.size for index, _ in groups(batch.bounds, singly=False)) / batch.bounds[-1]
        moved = batch.to(torch.device(chosen.device))
        spent: list[list[float]] = [[], []]
        for number in range(chosen.rounds + 1):
            for network, times in zip(networks, spent, strict=True):
                seconds = step(network, moved, chosen.device)
                if number:  # the first warms up
                    times.append(seconds)
        ours, leaking = map(statistics.median, spent)
        print(
            f"| {kind} | {way} | {ours:.2f} | {leaking:.2f} | {ours / leaking:.2f} | {computed - 1:+.1%} |", flush=True
        )


def let_leak(network: CausalLM, way: Way) -> None:
    """Let recurrent layers go through whole rows; without bounds, which their code without kernels refuses."""
    names = {name for name, _ in way.separated}
    for module in network.base.modules():
        if type(module).__name__ in names:
            module.forward = functools.partial(without_bounds, module.forward)


def without_bounds(forward: Any, *args: Any, **kwargs: Any) -> Any:
    kept = {name: value for name, value in kwargs.items() if not name.startswith(LAYOUT)}
    return forward(*args, **{name: None if name == "attention_mask" else value for name, value in kept.items()})


def step(network: Any, batch: Any, device: str) -> float:
    """Return the seconds of a forward and a backward pass."""
    network.zero_grad()
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    network(batch).backward()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
