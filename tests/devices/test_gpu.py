"""What must be true on a GPU. `POSTTRAIN_EMULATE=1 pytest -m gpu tests/devices/test_gpu.py` runs it on a CPU whose kernels of
variable length are emulated (see flash.py), so that the tests themselves are known to work; `benchmarks/gpu.sh` runs it
where there is a GPU.
"""

import contextlib
import gc
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import flash
import pytest
import torch
from architectures import ROWS, alone, networks
from golden import CASES, FILE, STEPS
from policies import grpo
from strategies import STRATEGIES, TRAINERS, distill
from test_kernels import ATTENTIONS, attended
from test_throughput import Waits
from toy import MARGINS, losses, metrics, network, pair, trainer

from posttrain import hooks
from posttrain.blocks.layout import collate_pairs, lay
from posttrain.blocks.models import activations
from posttrain.blocks.models.experts.precision import use_grouped_experts
from posttrain.trainers.sft import SFTTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # libraries may warn of what is no news to them
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CURVES: dict[str, dict[str, list[float]]] = json.loads(FILE.read_text())
FIRST = 5
"""Steps of a curve that are compared; rounding grows with every step."""


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Compute in whole float32 where that is asked for, and leave no memory behind."""
    if not ON_GPU and not os.environ.get("POSTTRAIN_EMULATE"):
        pytest.skip("there is no GPU; POSTTRAIN_EMULATE=1 tries it with emulated kernels")
    torch.backends.cudnn.allow_tf32 = False
    with contextlib.nullcontext() if ON_GPU else flash.emulated():
        yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One group for all strategies: DeepSpeed keeps the first that it sees."""
    file = tmp_path_factory.mktemp("ranks") / "store"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # there may be no network
        os.environ.setdefault(name, "lo")
    if ON_GPU:
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def on_gpu(folder: Path, method: Any = SFTTrainer, **keys: Any) -> Any:
    """A toy trainer on the GPU."""
    return trainer(folder, method, **{"accelerator": DEVICE, "devices": 1, "precision": "32-true", **keys})


def case_of(name: str, folder: Path, **keys: Any) -> Any:
    """One of the golden cases on the GPU."""
    keys = {"max_steps": STEPS, "stop_after": FIRST, "max_grad_norm": 1.0, "accelerator": DEVICE, "devices": 1, **keys}
    return distill(folder, **keys) if name == "distill" else trainer(folder, **keys, **TRAINERS[name])


# -- attention and packed rows --------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTIONS)
def test_real_kernels_give_what_attention_of_each_document_does(name: str) -> None:
    """Forward and backward, sinks and windows included; it also shows that the double on CPUs is right."""
    found = attended(device=DEVICE, **ATTENTIONS[name])
    flash.kernels.DEVICES.discard("cpu")
    expected = attended(**ATTENTIONS[name])
    for ours, theirs in zip(found, expected, strict=True):
        most = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours.detach().float().cpu(), theirs.float(), rtol=0, atol=5e-3 * most)


KINDS = (
    "llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v3", "llama4_text", "qwen3_next", "jamba",
    "lfm2",
)  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_what_each_document_gives_alone(kind: str, precision: str) -> None:
    """Against transformers' own network in float32 on the CPU, loss and gradient."""
    net, theirs = networks(kind)
    use_grouped_experts(net.hf)
    expected = alone(theirs)
    expected.backward()
    net.to(DEVICE)
    batch = lay(ROWS, 0).map(lambda x: x.to(DEVICE))
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        found = net(batch)
        found.backward()
    exact = precision == "float32"
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4 if exact else 2e-2)
    slopes = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    ours = {name: p.grad.cpu() for name, p in net.hf.named_parameters() if p.grad is not None}
    assert ours.keys() == slopes.keys()
    differ, whole = (
        math.sqrt(sum(float(x.square().sum()) for x in each))
        for each in ([ours[name] - slopes[name] for name in slopes], slopes.values())
    )
    assert differ <= (1e-3 if exact else 0.25) * whole


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pairs_that_branch_get_what_each_side_gets_alone(precision: str) -> None:
    torch.manual_seed(0)
    net: Any = network().build(None).to(DEVICE)
    batch = collate_pairs([[pair(seed) for seed in range(8)]], columns=MARGINS).map(lambda x: x.to(DEVICE))
    assert batch.branch is not None and batch.branch.input_ids.numel() < batch.input_ids.numel()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        found, expected = net(batch, "log_probs"), net(attrs.evolve(batch, branch=None), "log_probs")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if precision == "float32" else 5e-2)


# -- trainers -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_learns_in_float32_as_on_a_cpu(case: str, tmp_path: Path) -> None:
    case_of(case, tmp_path, precision="32-true").train()
    for name, values in CURVES[case].items():
        assert [line[name] for line in metrics(tmp_path)] == pytest.approx(values[:FIRST], rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_learns_in_half_precision_as_in_float32(case: str, tmp_path: Path) -> None:
    case_of(case, tmp_path, precision="bf16-mixed").train()
    for name, bound in (("loss", 0.03), ("grad_norm", 0.15)):
        found = [line[name] for line in metrics(tmp_path)]
        assert found == pytest.approx(CURVES[case][name][:FIRST], rel=bound, abs=0.02), name


def test_a_loss_scale_settles_and_learns(tmp_path: Path) -> None:
    """With a scale, on the CPU Fabric takes bfloat16 instead."""
    on_gpu(tmp_path, precision="16-mixed", max_steps=30, log_every=10).train()
    found = metrics(tmp_path)
    assert math.isfinite(found[-1]["loss"]) and found[-1]["loss"] < found[0]["loss"]


@pytest.mark.parametrize("case", ["sft", "dpo", "reward", "swiftkv", "speculator", "distill", "dpo-lora"])
def test_the_host_does_not_wait_between_logs(case: str, tmp_path: Path) -> None:
    """Neither in the step nor around it; the first steps may set things up."""
    waits, quiet = Waits(), []

    @hooks.before("trainer.step")
    def begin(trainer: Any, batches: Any) -> None:
        if ON_GPU and trainer.run.step % 5 >= 2:  # after a log, the first fetch is under way already
            torch.cuda.set_sync_debug_mode("error")
        quiet.append(-sum(waits.found.values()))

    @hooks.after("trainer.count")
    def end(trainer: Any, result: Any) -> None:
        quiet[-1] += sum(waits.found.values())
        if ON_GPU and trainer.run.step % 5 == 4:  # the next one logs
            torch.cuda.set_sync_debug_mode("default")

    keys: dict[str, Any] = {"log_every": 5, "max_steps": 10, "stop_after": None, "precision": "bf16-mixed"}
    try:
        with contextlib.nullcontext() if ON_GPU else waits:
            case_of(case, tmp_path, **keys).train(callbacks=[begin, end])
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert ON_GPU or quiet == [0] * 10, waits.found


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("zero-0", "zero-1")])
def test_a_strategy_with_one_rank_learns_like_none(name: str, tmp_path: Path, one_rank: None) -> None:
    """Over NCCL on a GPU."""
    case_of("sft", tmp_path, precision="32-true", strategy=STRATEGIES[name]).train()
    for key, values in CURVES["sft"].items():
        assert [line[key] for line in metrics(tmp_path)] == pytest.approx(values[:FIRST], rel=2e-3), key


@pytest.mark.parametrize("name", ["fsdp", "zero-3"])
def test_a_sharding_strategy_learns_in_half_precision(name: str, tmp_path: Path, one_rank: None) -> None:
    if name not in STRATEGIES:
        pytest.skip(f"{name} is not installed")
    case_of("sft", tmp_path, precision="bf16-mixed", strategy=STRATEGIES[name]).train()
    assert losses(tmp_path) == pytest.approx(CURVES["sft"]["loss"][:FIRST], rel=0.03)


@pytest.mark.parametrize(("first", "then"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_checkpoint_of_one_device_goes_on_on_another(first: str, then: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_steps": STEPS, "max_grad_norm": 1.0, "precision": "32-true", "devices": 1}
    trainer(tmp_path, accelerator=first, stop_after=2, **keys).train()
    run = trainer(tmp_path, accelerator=then, stop_after=FIRST - 2, **keys).train()
    assert run.first_step == 2
    assert losses(tmp_path) == pytest.approx(CURVES["sft"]["loss"][:FIRST], rel=2e-3)


WAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {"activation_checkpointing": True},
    "selective": {"activation_checkpointing": "selective"},
    "offload": {"activation_checkpointing": True, "offload_activations": True},
    "tiles": {"tiled_mlp": 3},
    "compiled": {"compile": True, "activation_checkpointing": True},
}
if importlib.util.find_spec("liger_kernel") and ON_GPU:
    WAYS["liger"] = {"liger": True}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_save_memory_or_time_changes_what_is_learned(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "LARGE", 0)  # toy activations are offloaded, too
    torch.compiler.reset()
    model = {**WAYS[way], **({"compile": "aot_eager"} if way == "compiled" and not ON_GPU else {})}
    for name, more in (("with", model), ("without", {})):
        made = on_gpu(tmp_path / name, precision="bf16-mixed", max_steps=STEPS, stop_after=FIRST, model=more)
        made.train()
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=5e-3)


def test_replies_are_sampled_and_learned_from(tiny_model: Path, tmp_path: Path) -> None:
    """What the sampler says of its own tokens is what the policy says of them."""
    grpo(tmp_path / "run", tiny_model, accelerator=DEVICE, devices=1, precision="bf16-mixed", max_steps=3).train()
    found = metrics(tmp_path / "run")
    assert len(found) == 3 and all(math.isfinite(line["loss"]) for line in found)
