"""The benchmarks run here, so that they also run where a GPU or a cluster is lent for minutes; what they count is right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_sft  # noqa: E402
import scaling  # noqa: E402


def printed(script: str, *options: str) -> list[list[str]]:
    """Run a benchmark, and return the cells of its rows."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]


def test_a_collective_sends_what_a_ring_sends() -> None:
    whole, part = torch.zeros(8), torch.zeros(2)  # of 4 ranks: 32 bytes and 8
    assert scaling.sent("allreduce_", [whole], 4) == 2 * 3 * 8
    assert scaling.sent("_allgather_base_", [whole, part], 4) == 3 * 8
    assert scaling.sent("_reduce_scatter_base_", [part, whole], 4) == 3 * 8
    assert scaling.sent("alltoall_base_", [whole, whole], 4) == 3 * 8
    assert scaling.sent("allgather_", [part, part, part, part, part], 4) == 3 * 8
    assert scaling.sent("allreduce_", [whole], 1) == 0
    with pytest.raises(NotImplementedError):
        scaling.sent("a_new_collective_", [whole], 4)


def test_more_gpus_never_predict_a_faster_step() -> None:
    for strategy in ("ddp", "fsdp", "hsdp"):
        steps = [scaling.predicted(strategy, gpus, 8e9, 32, 8192)["step"] for gpus in (8, 64, 1024)]
        assert steps == sorted(steps)


@pytest.mark.slow
def test_ddp_sends_its_gradients_twice_but_for_its_own_share() -> None:
    [_, _, row] = printed("scaling.py", "--only", "ddp", "--ranks", "2", "--steps", "2")
    assert row[:2] == ["ddp", "2"]
    assert float(row[4]) == pytest.approx(1, abs=1e-3)


def test_mfu_counts_the_products_of_a_model_as_torch_does() -> None:
    """Against torch's own counter, for one document, forward and backward; it counts the whole square of attention."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    setting = gpu_sft.Setting(tiny=True, steps=1, rows=1, length=64, compile=False)
    model = LlamaForCausalLM(setting.config())
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(64)[None], use_cache=False).logits
        logits.sum().backward()
    needed = gpu_sft.Clock(setting).needed(64, 2 * 64.0**2)
    # The first layer's input needs no gradient: embeddings are looked up.
    assert counter.get_total_flops() == pytest.approx(needed, rel=0.02)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_a_small_model() -> None:
    rows = printed("gpu_sft.py", "--tiny", "--steps", "2", "--rounds", "1", "--longest")
    found = {row[0]: row for row in rows}
    assert all(float(found[name][1]) > 0 for name in ("posttrain", "bare"))
    assert "activation_checkpointing" in found["1024"][-1]
