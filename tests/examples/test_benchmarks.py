"""The benchmarks run here, so that they also run where a GPU or a cluster is lent for minutes; what they count is right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from allocated import most

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_sft  # noqa: E402
import models  # noqa: E402
import scaling  # noqa: E402


def printed(script: str, *options: str) -> list[list[str]]:
    """Run a benchmark, and return the cells of its rows."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]


def rows_of_the_table(images: bool = False) -> dict[str, list[str]]:
    """What docs/models.md says of each type, on text or on images."""
    text, _, seen = (ROOT / "docs" / "models.md").read_text().partition(models.image_models.TITLE)
    lines = (seen if images else text).splitlines()
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `"))
    return {row[0].strip("`"): row for row in cells}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "mamba2", "falcon"])
def test_the_table_of_models_says_what_is_measured(kind: str) -> None:
    row = models.measure(kind)
    assert [row.verdict, row.way, row.export] == [rows_of_the_table()[kind][i] for i in (1, 2, 6)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["mixtral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma4", "bamba"))]
)
def test_the_table_of_models_says_what_a_type_can_be_used_for(kind: str) -> None:
    """Experts in float64; a model of images without its tower; a cache that does not know its length."""
    assert list(attrs.astuple(models.Uses.of(kind, {}))) == rows_of_the_table()[kind][models.MEASURED :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [
        "deepseek_vl",
        "llava_next_video",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("aria", "gemma4", "idefics2", "qianfan_ocr")),
    ],
)
def test_the_table_of_models_says_what_becomes_of_images(kind: str) -> None:
    """Features of the inner network alone; a part for videos in front; texts without images, which a processor refuses;
    a part for sound; places that depend on each other; a place that is not the token."""
    assert models.image_models.seen(kind, models.CHANGES) == rows_of_the_table(images=True)[kind][1]


@pytest.mark.skipif("POSTTRAIN_ALL_TYPES" not in os.environ, reason="an hour: set POSTTRAIN_ALL_TYPES=1")
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore")
def test_every_causal_type_of_transformers_is_what_the_table_says_and_none_is_wrong() -> None:
    said = rows_of_the_table()
    verdicts = {kind: models.measure(kind).verdict for kind in models.CAUSAL}
    assert "wrong" not in verdicts.values()
    assert verdicts == {kind: said[kind][1] for kind in models.CAUSAL}


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


def test_the_most_memory_of_tensors_is_counted_with_what_operators_need_inside() -> None:
    before = torch.ones(1_000)

    def work() -> None:
        nonlocal before
        first = torch.ones(1_000_000)  # 4 MB
        second = torch.ones(3, 1_000_000)  # 12 MB
        del first, before
        second.logsumexp(1)  # which copies what it is given, and needs a number for each row four times
        del second
        torch.ones(2_000_000)

    assert most(work) == pytest.approx(12_000_000 + 12_000_000, abs=100)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_a_small_model() -> None:
    rows = printed("gpu_sft.py", "--tiny", "--steps", "2", "--rounds", "1", "--longest")
    found = {row[0]: row for row in rows}
    assert all(float(found[name][1]) > 0 for name in ("posttrain", "bare"))
    assert "activation_checkpointing" in found["1024"][-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_with_images_is_measured_from_files_on() -> None:
    """TRL's half of a cell is a dash where it is not installed."""
    [*_, row] = printed("image_step.py", "--only", "qwen2_5_vl", "--steps", "1", "--rounds", "1")
    assert row[:2] == ["qwen2_5_vl", "language, projector, tower"]
    assert all(float(cell.split(" / ")[0]) > 0 for cell in row[2:6])


def test_a_profile_says_how_long_the_device_was_idle_and_with_what_it_was_busy() -> None:
    def event(name: str, begin: float, spent: float) -> dict[str, Any]:
        return {"cat": "kernel", "name": name, "ts": begin, "dur": spent}

    events = [event("gemm<int>(x)", 0, 40), event("copy", 30, 20), event("gemm<float>", 75, 25), {"cat": "cpu_op"}]
    found = gpu_profile.said(events)
    assert found["idle"] == "25.0%"
    assert found["most of it"] == ["gemm 65.0%", "copy 20.0%"]
    assert "no device" in gpu_profile.said([{"cat": "cpu_op"}])["idle"]


def test_the_page_of_a_gpu_says_what_is_aimed_at_beside_what_was_found() -> None:
    results: dict[str, Any] = {
        "posttrain": {"name": "posttrain", "tokens/s": 980, "MFU": 0.511},
        "bare loop": {"name": "bare loop", "tokens/s": 1000},
        "TRL": {"name": "TRL", "error": "no time was left"},
        "SwiftKV prefill of 2048": {"name": "SwiftKV prefill of 2048", "gain": 1.5, "by formula": 2.0},
    }
    page = gpu.page(results)
    assert "| TRL | not measured: no time was left |" in page
    assert "- MFU at least 50 %: 51.1%" in page
    assert "- at most 2 % below the bare loop: -2.0%" in page
    assert "- SwiftKV prefill of 2048, within 10 % of the formula: -25.0%" in page
    assert "above TRL" not in page


def test_a_measurement_that_fails_or_takes_too_long_is_named_and_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time\n"
        "for name in [n for n in sys.argv[2:] if n != '--tiny']:\n"
        "    if name == 'bad': sys.exit('out of memory')\n"
        "    if name == 'slow': time.sleep(60)\n"
        '    print(\'RESULT {"name": "%s", "ms": 1}\' % name, flush=True)\n'
    )
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    monkeypatch.setattr(gpu, "SECONDS", {"slow": 0.5})
    gpu.measured(["one", "bad", "two", "slow", "three"], True, gpu.time.monotonic() + 60, found.append)
    assert [row["name"] for row in found] == ["one", "bad", "two", "slow", "three"]
    assert [row.get("error") for row in found] == [None, "out of memory", None, "more than 0 s", None]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_pack_for_a_gpu_runs_on_a_cpu_and_goes_on_where_it_was_left(tmp_path: Path) -> None:
    """All of its parts, and the tests of a GPU with emulated kernels; a machine without TRL or Triton cannot measure those."""
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def run(*options: str) -> str:
        command = ["bash", ROOT / "benchmarks" / "gpu.sh", "--tiny", "--seconds", "1100", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("--only", "machine", "methods", "profile")
    run()
    results = {row["name"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert set(results) == {name for part in gpu.WORK.values() for name in part} | {"tests"}
    failed = {name: row["error"] for name, row in results.items() if "error" in row}
    assert set(failed) <= {"TRL", "posttrain, liger"}, failed
    assert results["tests"]["failed"] == 0 and "passed" in results["tests"]["ended"], results["tests"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sum('"profile"' in line for line in lines) == 1  # the second run went on
    assert (tmp_path / "gpu.md").read_text() in run("--only", "profile")
    assert len(list(tmp_path.iterdir())) <= 8
