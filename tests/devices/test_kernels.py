"""The branch that only GPUs take, on the CPU: kernels of variable length (see flash.py) and experts under autocast."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flash
import pytest
import torch
from architectures import KINDS, ROWS, networks
from golden import FILE, STEPS
from lightning.fabric.plugins.precision.amp import MixedPrecision
from strategies import TRAINERS, distill
from test_throughput import Waits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import metrics, trainer
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain import hooks
from posttrain.blocks.layout import lay
from posttrain.blocks.models.documents import kernels
from posttrain.blocks.models.documents.attention import packed_attention
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.experts.precision import use_grouped_experts
from posttrain.blocks.parallel.sharding import replace_tensors

Calls = Counter[str]


@pytest.fixture
def gpu() -> Iterator[Calls]:
    """The kernels of a GPU."""
    with flash.emulated() as calls:
        yield calls


BOUNDS = [0, 5, 6, 14, 24]
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared keys": {"groups": 1},
    "window": {"sliding_window": 3},
    "sinks": {"s_aux": True},
    "sinks and window": {"s_aux": True, "sliding_window": 3, "groups": 2},
    "latent": {"size": 24, "values": 16},
    "odd heads": {"size": 20, "values": 12},
    "scaled": {"scaling": 0.3},
    "two rows": {"rows": 2},
}


def attended(
    rows: int = 1, size: int = 16, values: int | None = None, groups: int = 4, s_aux: bool = False,
    device: str = "cpu", **keys: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """Return what four heads give for four documents, and its gradients by queries, keys, values and sinks."""
    random = torch.Generator().manual_seed(0)
    shapes = [(4, size), (groups, size), (groups, values or size)]
    made = [torch.randn(rows, n, 24 // rows, of, generator=random).half().float() for n, of in shapes]
    made += [torch.randn(4, generator=random)] if s_aux else []
    given = [x.to(device).requires_grad_() for x in made]
    bounds = torch.tensor(BOUNDS if rows == 1 else [0, 5, 12, 19, 24], dtype=torch.int32, device=device)
    with torch.autocast(device, dtype=torch.float16, enabled=device in kernels.DEVICES):
        out, _ = packed_attention(
            torch.nn.Module(), *given[:3], None, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=10,
            max_length_k=10, s_aux=given[3] if s_aux else None, **keys,
        )  # fmt: skip
    weights = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), given)]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_kernels_of_variable_length_give_what_attention_of_each_document_does(name: str) -> None:
    expected = attended(**ATTENTIONS[name])
    with flash.emulated() as calls:
        found = attended(**ATTENTIONS[name])
    assert calls == {"forward": 1, "backward": 1}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=0, atol=4e-3 * max(1.0, float(theirs.abs().max()))
        )


def test_documents_that_branch_see_their_common_beginning(gpu: Calls) -> None:
    keys = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9], dtype=torch.int64)  # 3 tokens are there once
    q, k, v = (torch.randn(1, 2, 10, 8, generator=torch.Generator().manual_seed(i)).half() for i in range(3))
    more: dict[str, Any] = {
        "cu_seq_lens_q": torch.tensor([0, 6, 10], dtype=torch.int32), "max_length_q": 6, "max_length_k": 7,
        "cu_seq_lens_k": torch.tensor([0, 6, 13], dtype=torch.int32), "kv_index": keys,
    }  # fmt: skip
    found, _ = packed_attention(torch.nn.Module(), q, k, v, None, **more)
    assert gpu["forward"] == 1
    expected, _ = packed_attention(torch.nn.Module(), *(x.float() for x in (q, k, v)), None, **more)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda x: x.float()}, "fp16 and bf16"),
        ({"k": lambda x: x.bfloat16()}, "must have the same dtype"),
        ({"v": lambda x: x[..., :8]}, "k and v must have shape"),
        ({"q": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous last dimension"),
        ({"bounds": lambda x: x.long()}, "int32"),
        ({"bounds": lambda x: x - 1}, "from 0 to 24"),
        ({"longest": lambda x: x - 1}, "longest"),
    ],
)
def test_the_double_refuses_what_kernels_refuse(gpu: Calls, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        **{name: torch.randn(24, 4, 16).half() for name in "qkv"}, "bounds": torch.tensor(BOUNDS, dtype=torch.int32),
        "longest": 10,
    }  # fmt: skip
    given |= {name: made(given[name]) for name, made in change.items()}
    q, k, v, bounds, longest = given.values()
    with pytest.raises(AssertionError, match=message):
        kernels.varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))


FAST = ("llama", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")
"""Types whose attention must come to kernels of variable length; the others of the table are slow tests."""
SLOWLY = {"gemma2", "llama4_text"}
"""Types that have attention which those kernels cannot compute."""
OTHERS = [kind for kind in KINDS if kind not in FAST]


@pytest.mark.parametrize(
    "kind", [*FAST, "gemma2", *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS if k != "gemma2")]
)
def test_an_architecture_computes_in_half_precision_what_it_does_in_float32(kind: str) -> None:
    """Rounding apart; a document that leaks, or a gradient that is left out, is far more."""
    net, _ = networks(kind)
    batch = lay(ROWS, 0)
    expected = net(batch)
    expected.backward()
    theirs = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    with flash.emulated() as calls, torch.autocast("cpu", dtype=torch.float16):
        found = net(batch)
        (found * 1e-2).backward()  # float16 is short of range
    ours = {name: p.grad * 1e2 for name, p in net.named_parameters() if p.grad is not None}
    if kind in FAST:
        assert calls["forward"] == calls["backward"] > 0
    elif kind in SLOWLY:
        assert calls["forward"] < net.hf.config.num_hidden_layers
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)
    assert ours.keys() == theirs.keys()
    differ, whole = (sum(float(x.square().sum()) for x in each) for each in ([ours[n] - theirs[n] for n in theirs], theirs.values()))  # fmt: skip
    assert differ**0.5 <= 0.06 * whole**0.5


def test_the_host_knows_where_documents_begin_without_asking_the_device(
    gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where attention goes document by document, as in float32 and with soft caps."""
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the device was asked"))
    net, _ = networks("gemma2")
    monkeypatch.undo()
    batch = lay(ROWS, 0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the device was asked"))
    with Waits() as waits:
        net(batch).backward()
    assert not waits.found


TRACED = ("llama", "gpt_oss", "deepseek_v3")
WAITS = {"llama dynamic": "transformers compares the longest position with what it has seen"}
"""Types whose code in transformers asks the device for a number."""


class Elsewhere(torch.autocast):
    """Autocast, which does not know the stand-in of a GPU: nothing, where it is asked to do nothing."""

    def __new__(cls, device: str, *args: Any, **keys: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else torch.autocast(device, *args, **keys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [*TRACED, *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in TRACED)]
)
def test_a_step_needs_no_number_of_the_device_and_nothing_that_stayed_on_the_host(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without numbers, on a device that is not the host's: asking for a number, or mixing devices, is an
    error. (torch for CPUs cannot index fake tensors of CUDA; `meta` stands for it.)"""
    net, _ = networks(kind)
    use_grouped_experts(net.hf)
    net = net.bfloat16().train()
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and known(device))
    monkeypatch.setattr(torch, "autocast", Elsewhere)
    with flash.kernels_on("meta"), FakeTensorMode(allow_non_fake_inputs=True):
        replace_tensors(net, lambda _, x: torch.empty(x.shape, dtype=x.dtype, device="meta"))
        batch = lay(ROWS, 0).map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"))
        with (
            Ops() as ops,
            pytest.raises(Exception, match="_local_scalar_dense") if kind in WAITS else contextlib.nullcontext(),
        ):
            net(batch).backward()
    assert kind not in FAST or ops.found["torch_attn::_varlen_attn"] > 0


class Ops(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.name()] += 1
        return func(*args, **kwargs or {})


GOLDEN = ("sft", "dpo", "distill", "swiftkv")
CURVES: dict[str, dict[str, list[float]]] = json.loads(FILE.read_text())


@pytest.mark.filterwarnings("ignore")  # autocast's own
@pytest.mark.parametrize(
    "case", [*GOLDEN, *(pytest.param(k, marks=pytest.mark.slow) for k in CURVES if k not in GOLDEN)]
)
def test_a_trainer_learns_in_half_precision_as_in_float32(case: str, tmp_path: Path, gpu: Calls) -> None:
    keys: dict[str, Any] = {"max_steps": STEPS, "stop_after": 4, "max_grad_norm": 1.0, "precision": "bf16-mixed"}
    made = distill(tmp_path, **keys) if case == "distill" else trainer(tmp_path, **keys, **TRAINERS[case])
    made.train()
    assert gpu["forward"] > 0
    for name, bound in (("loss", 0.03), ("grad_norm", 0.15)):
        found = [line[name] for line in metrics(tmp_path)]
        assert found == pytest.approx(CURVES[case][name][:4], rel=bound, abs=0.02), name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_compute_in_the_precision_of_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of all experts is not one that autocast knows: it took the float32 of the weights."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(tiny(AutoConfig.for_model(kind), vocabulary=97))
    experts = next(part for part in hf.modules() if type(part).__name__.endswith("Experts"))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden, weights = torch.randn(20, hf.config.hidden_size, requires_grad=True), torch.rand(20, 2)
    chosen = torch.randint(0, experts.num_experts, (20, 2))
    seen, product = [], torch.nn.functional.grouped_mm

    def noted(x: torch.Tensor, weight: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append((x.dtype, weight.dtype))
        return product(x, weight, **more)

    def given(precision: torch.dtype | None) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
            out = experts(hidden, chosen, weights)
        assert out.dtype == torch.float32
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (hidden, *experts.parameters()))]

    expected = given(None)
    use_grouped_experts(hf)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", noted)
    for ours, theirs in zip(given(None), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    for ours, theirs in zip(given(torch.bfloat16), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * float(theirs.abs().max()))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_reach_the_kernels_without_a_break_in_their_graphs(gpu: Calls, tmp_path: Path) -> None:
    """As the default recipe does, with activation checkpointing around compiled layers."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = {"compile": "eager", "activation_checkpointing": True}
    trainer(tmp_path, max_steps=2, precision="bf16-mixed", model=model).train()
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"], counters["graph_break"]
    assert gpu["forward"] > 0


def test_it_is_said_once_that_attention_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "posttrain"), flash.emulated() as calls:
        for _ in range(2):
            attended(softcap=7.0)
            attended(size=264)
    assert not calls
    said = [record.message for record in caplog.records]
    assert len(said) == len(set(said)) <= 2


def test_gradients_are_clipped_under_a_loss_scale_although_the_optimizer_is_fused(tmp_path: Path) -> None:
    """On a GPU that is `precision: 16-mixed`, which Fabric refuses on a CPU; only the loss scale is tried here."""

    @hooks.before("trainer.fit")
    def scaled(trainer: Any) -> None:
        run = trainer.run
        run.fabric._precision = run.fabric.strategy._precision = MixedPrecision("16-mixed", "cpu")
        run.skips = True

    for name, callbacks in (("with", [scaled]), ("without", [])):
        trainer(tmp_path / name, max_steps=3, max_grad_norm=0.5).train(callbacks=callbacks)
    found, expected = (
        [line[key] for line in metrics(tmp_path / name) for key in ("loss", "grad_norm")]
        for name in ("with", "without")
    )
    assert found == pytest.approx(expected, rel=2e-3)
