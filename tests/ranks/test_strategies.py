"""Every strategy gives what one process gives, for every trainer, and goes on from what any other has saved.

All runs on two ranks share one launch: `on_ranks` is what it executes.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_many_ranks, on_two_ranks
from strategies import SHARDED, STRATEGIES, TRAINERS
from toy import metrics, trainer

import posttrain
from posttrain import after
from posttrain.blocks.checkpoints import state
from posttrain.errors import CheckpointError

CUT = [name for name in ("ddp", "fsdp", "zero-2", "zero-3") if name in STRATEGIES]
"""Strategies whose checkpoints every other one goes on from."""
SEQUENCES = [(case, name, 2) for case in ("sft", "swiftkv") for name in ("ddp", "fsdp", "zero-3") if name in STRATEGIES]
"""Trainer, strategy, and how many ranks share a row."""
KEYS: dict[str, Any] = {
    "max_steps": 6,
    "eval_rows": 5,
    "eval_every": 3,
    "max_grad_norm": 0.3,
    "callbacks": [posttrain.EMA(decay=0.5)],
}
LAST = 3
"""The step that runs are cut after."""


def on_ranks(folder: Path) -> None:
    """Train everything: four rows a step, divided among the ranks."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuts = {"micro_batch_size": 1, "gradient_accumulation_steps": 4 // ranks}
    strategies = STRATEGIES | ({"fsdp-hybrid": posttrain.FSDP(shard_size=2)} if ranks == 4 else {})
    for name, strategy in strategies.items():
        os.environ["POSTTRAIN_CACHE"] = str(folder / f"cache {name}")
        for case, keys in TRAINERS.items():
            if not tried(case, name, ranks):
                continue
            made = trainer(folder / f"{case} {name}", **KEYS, **cuts, **keys, strategy=strategy)
            run = made.train(callbacks=[] if name == "ddp" else [only_rank_zero_loads])
            (run.output_dir / f"said-{rank}.json").write_text(json.dumps(said(run)))
    for case, name, size in SEQUENCES if ranks == 2 else [*SEQUENCES, ("sft", "ddp", 4)]:
        split = {"micro_batch_size": 2, "gradient_accumulation_steps": 2 * size // ranks}
        keys = KEYS | split | TRAINERS[case] | {"sequence": posttrain.Ulysses(size=size), "strategy": STRATEGIES[name]}
        trainer(folder / f"{case} {name} in {size} parts", **keys).train()
    for origin in CUT:
        trainer(folder / f"cut {origin}", **KEYS, **cuts, strategy=STRATEGIES[origin], stop_after=LAST).train()
    for origin in (*CUT, "alone"):
        for name, strategy in strategies.items():
            there = folder / f"cut {origin} on {name}"
            if rank == 0:
                shutil.copytree(folder / f"cut {origin}", there)
            run = trainer(there, **KEYS, **cuts, strategy=strategy).train()
            assert run.first_step == LAST
    a_rank_cannot_write(trainer(folder / "full disk", **KEYS, **cuts, strategy=posttrain.FSDP()), rank)


def tried(case: str, name: str, ranks: int) -> bool:
    """Two ranks try every trainer with the strategies that differ most, four ranks (slow) with the others."""
    return case in ("sft", "dpo", "swiftkv", "speculator") or (name in CUT) == (ranks == 2)


def said(run: Any) -> list[int]:
    """Return what the trained network goes on to say, greedily, if it speaks."""
    if not hasattr(run.model.module, "generate"):
        return []
    ids = torch.tensor([[5, 6, 7]])
    found: list[int] = run.model.module.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist()
    return found


@after("model.build")
def only_rank_zero_loads(block: Any, module: Any) -> None:
    """Other ranks are sent what they keep."""
    assert {parameter.is_meta for parameter in module.parameters()} == {os.environ["RANK"] != "0"}


def a_rank_cannot_write(made: Any, rank: int) -> None:
    """All ranks say so, and nothing half-written stays."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saved, state.save_file = state.save_file, full if rank == 1 else state.save_file
    with pytest.raises(CheckpointError, match=r"step 6 could not be saved.*No space left"):
        made.train()
    state.save_file = saved
    assert rank or not list(made.output_dir.glob("step-*"))  # rank zero has removed it


def launch(folder: Path, ranks: int) -> Path:
    """Run `on_ranks` in so many processes."""
    trainer(folder / "cut alone", **KEYS, stop_after=LAST).train()
    call = ["test_strategies", "on_ranks(folder)"]
    if ranks == 2:
        on_two_ranks(folder.parent, *call, timeout=900)
    else:
        on_many_ranks(ranks, folder.parent, *call, timeout=900)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks trained; some of it goes on from what one process saved."""
    return launch(tmp_path_factory.mktemp("ranks") / "two", 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process trained."""
    os.environ["POSTTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    folders = {}
    for case, keys in TRAINERS.items():
        folders[case] = tmp_path_factory.mktemp("alone")
        run = trainer(folders[case], **KEYS, **keys).train()
        (folders[case] / "said.json").write_text(json.dumps(said(run)))
    return folders


def assert_equal_metrics(folder: Path, other: Path) -> None:
    ours, theirs = metrics(folder), metrics(other)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, abs=1e-5, rel=1e-5)


def assert_equal_exports(folder: Path, other: Path) -> None:
    """The weights, and their moving average."""
    from safetensors.torch import load_file

    for name in ("huggingface", "huggingface-ema"):
        ours, theirs = (load_file(next((where / name).glob("*.safetensors"))) for where in (folder, other))
        assert ours.keys() == theirs.keys()
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5


@pytest.mark.timeout(900)  # the first one waits for them all
@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in TRAINERS for name in STRATEGIES if tried(case, name, 2)]
)
def test_two_ranks_train_and_export_like_one(case: str, name: str, runs: Path, alone: dict[str, Path]) -> None:
    folder = runs / f"{case} {name}"
    assert_equal_metrics(folder, alone[case])
    assert (folder / "said-0.json").read_text() == (folder / "said-1.json").read_text()
    assert (folder / "said-0.json").read_text() == (alone[case] / "said.json").read_text()
    assert_equal_exports(folder, alone[case])


@pytest.mark.parametrize(("case", "name", "size"), SEQUENCES)
def test_two_ranks_share_rows_and_train_like_one(
    case: str, name: str, size: int, runs: Path, alone: dict[str, Path]
) -> None:
    assert_equal_metrics(runs / f"{case} {name} in {size} parts", alone[case])


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("origin", [*CUT, "alone"])
def test_two_ranks_go_on_from_any_checkpoint(origin: str, name: str, runs: Path, alone: dict[str, Path]) -> None:
    assert_equal_metrics(runs / f"cut {origin} on {name}", alone["sft"])
    assert_equal_exports(runs / f"cut {origin} on {name}", alone["sft"])


@pytest.mark.parametrize("origin", CUT)
def test_one_process_goes_on_from_any_checkpoint(origin: str, runs: Path, alone: dict[str, Path]) -> None:
    resumed = trainer(runs / f"cut {origin}", **KEYS).train()
    assert resumed.first_step == LAST
    assert_equal_metrics(runs / f"cut {origin}", alone["sft"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_do_so_too(tmp_path: Path, alone: dict[str, Path]) -> None:
    """Hybrid sharding, two copies of two shards each, is among the strategies."""
    runs = launch(tmp_path / "two", 4)
    trained = [found.parent for found in runs.glob("*/metrics.jsonl") if found.parent.name != "full disk"]
    assert len(trained) > 40
    for found in trained:
        case = found.name.split()[0]
        if case in alone or " on " in found.name:  # else it is one that was cut
            assert_equal_metrics(found, alone.get(case, alone["sft"]))


@pytest.mark.parametrize("name", SHARDED)
def test_each_rank_writes_only_what_it_keeps(name: str, runs: Path) -> None:
    """Both files together are as large as one process's, and neither is much larger than the other."""
    ours, theirs = (
        [file.stat().st_size for file in next((runs / folder).glob("step-*")).glob("rank-*")]
        for folder in (f"sft {name}", "cut alone")
    )
    assert len(ours) == 2
    assert max(ours) < 1.1 * min(ours)
    assert sum(ours) < 1.1 * theirs[0]
