"""The host does not wait for the device between logs, compiled layers are compiled once, and a profile can be written."""

import itertools
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flash
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy import VOCABULARY, trainer

from posttrain import RecipeError, hooks
from posttrain.blocks.callbacks import MFU, Profiler
from posttrain.blocks.callbacks.speed import peak_of
from posttrain.runtime import signals
from posttrain.trainers.dpo import DPOTrainer
from posttrain.trainers.sft import SFTTrainer

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
"""What makes the host wait on a GPU, because a number or a size comes back from it; `item`, `float`, `bool` are the first."""


class Waits(TorchDispatchMode):
    """Counts the operations for which a host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        # A mask as an index becomes `nonzero` inside of the kernel.
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITING or by_mask:
            self.found["index by mask" if by_mask else name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("method", [SFTTrainer, DPOTrainer])
@pytest.mark.filterwarnings("ignore")
def test_the_host_waits_for_the_device_only_to_log(tmp_path: Path, method: type) -> None:
    waits, steps = Waits(), []

    @hooks.before("trainer.step")
    def begin(trainer: Any, batches: Any) -> None:
        steps.append(-sum(waits.found.values()))

    @hooks.after("trainer.count")
    def end(trainer: Any, result: Any) -> None:
        steps[-1] += sum(waits.found.values())

    with waits:
        trainer(tmp_path, method, log_every=4, gradient_accumulation_steps=2).train(callbacks=[begin, end])
    assert steps == [0] * 8, waits.found


def test_ranks_agree_on_a_signal_without_waiting_for_the_step_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is the flag of the step before, which the device has long combined."""
    made: list[Any] = []

    class Noted:
        def __init__(self, number: torch.Tensor) -> None:
            self.number = float(number)
            made.append(self)

        def read(self) -> float:
            assert self is not made[-1], "the flag of this step was asked for"
            return self.number

    monkeypatch.setattr(signals, "Later", Noted)
    monkeypatch.setattr(signals, "all_reduce", lambda fabric, flag, op: flag)
    two: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    found, known = [], signals.Signals()
    for step in range(4):
        known.received = 15 if step == 1 else known.received
        found.append(known.agreed(two))
    assert found == [None, None, 15, 15]


@pytest.mark.filterwarnings("ignore")
def test_counts_of_several_ranks_are_not_waited_for(tmp_path: Path) -> None:
    waits, seen = Waits(), []

    @hooks.before("trainer.update")
    def two_ranks(trainer: Any, batches: Any) -> None:
        with pytest.MonkeyPatch.context() as patch, waits:
            patch.setattr(type(trainer.run.fabric), "world_size", property(lambda fabric: 2))
            patch.setattr("posttrain.trainer.all_reduce", lambda fabric, sums: sums * 2)
            seen.append(trainer.totals(batches))

    made = trainer(tmp_path, max_steps=1)
    made.train(callbacks=[two_ranks])
    assert not waits.found
    assert float(seen[0]["weight"]) == 2 * made.run.batches[0].weight


def test_what_waits_is_seen() -> None:
    with Waits() as waits:
        float(torch.ones(2).sum())
        torch.ones(2)[torch.tensor([True, False])]
    assert waits.found == {"_local_scalar_dense": 1, "index by mask": 1}


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own ways
@pytest.mark.parametrize("packing", [True, False])
def test_compiled_layers_are_not_compiled_again_for_each_layout_of_a_row(tmp_path: Path, packing: bool) -> None:
    """Rows differ in their documents and width; a size that was seen to vary is a symbol from then on."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    graphs = []

    @hooks.before("trainer.save")
    def note(trainer: Any, at_end: bool) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    made = trainer(tmp_path, max_steps=12, packing=packing, micro_batch_size=2, model={"compile": "eager"})
    made.train(callbacks=[note])
    assert graphs[0] > 0
    assert sum(more > before for before, more in itertools.pairwise(graphs)) <= 2, graphs  # documents, then width


def test_a_profile_of_some_steps_is_written(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=6, callbacks=[Profiler(skip=2, steps=2)]).train()
    trace = json.loads((tmp_path / "profile" / "trace-rank-0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2
    table = (tmp_path / "profile" / "operators.txt").read_text()
    assert "aten::mm" in table


def test_a_profile_that_the_run_is_too_short_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"profiler: .* ends after step 3, .* 5 steps"):
        trainer(tmp_path, max_steps=3, callbacks=[Profiler(skip=2, steps=2)]).train()


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own ways
@pytest.mark.parametrize("saving", [{}, {"activation_checkpointing": "full"}, {"tiled_mlp": 3}, {"compile": "eager"}])
def test_operations_of_the_model_are_counted_and_not_what_is_computed_again(
    tmp_path: Path, saving: dict[str, Any]
) -> None:
    """Written out: two for each number of a matrix and token, three times, and attention in documents."""
    torch.compiler.reset()
    made = trainer(tmp_path, max_steps=3, model=saving, callbacks=[MFU(peak_tflops=0.5)])
    batches: list[Any] = []

    @hooks.before("trainer.step")
    def note(trainer: Any, found: list[Any]) -> None:
        batches.append(found)

    run = made.train(callbacks=[note])
    tokens = sum(batch.tokens for batch in batches[0])
    trained = sum(batch.supervised_tokens for batch in batches[0])
    lengths = torch.cat([batch["cu_seqlens"].diff() for batch in batches[0]])
    products = 3 * 2 * (2 * tokens * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + trained * 32 * VOCABULARY)
    attention = 2 * int((lengths**2).sum()) * 32 * 2 * (1 + 2.5)
    assert run.per_token["tflops"] * 1e12 * tokens == pytest.approx(products + attention, rel=0.02)
    assert run.last["mfu"] == pytest.approx(run.last["tflops"] / 0.5)


def test_kernels_for_many_documents_are_counted_like_attention_in_each(tmp_path: Path) -> None:
    found = {}
    for name, kernels in {"each": nullcontext, "one": flash.emulated}.items():
        with kernels():
            keys: dict[str, Any] = {"precision": "bf16-mixed", "max_steps": 1, "callbacks": [MFU()]}
            found[name] = trainer(tmp_path / name, **keys).train().per_token
    assert found["one"] == pytest.approx(found["each"])


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("RTX", None)])
def test_the_peak_of_a_device_is_that_of_its_data_sheet(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_of(torch.device("cuda")) == peak
    assert peak_of(torch.device("cpu")) is None
