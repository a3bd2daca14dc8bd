"""Reinforcement learning with images: what is true of text is true of prompts with pictures, beside others without."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vision
from compare import near
from policies import digest, replies
from toy import metrics

from posttrain import JSONL, AdamW, Constant, GRPOTrainer, HFModel, LoRA, PromptData, TransformersSampler
from posttrain.blocks.rollouts.ledger import read

EVERY = [f if f in ("qwen2_5_vl", "gemma3") else pytest.param(f, marks=pytest.mark.slow) for f in vision.FAMILIES]
SIZES = ((40, 24), (64, 64), (33, 57), (96, 40))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where the tiny models are, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = vision.make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


def rows(folder: Path) -> list[dict[str, Any]]:
    """Prompts with one, no and two images, one of which lies in its row, and one with text alone as its content."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{n}.png" for n in range(4)]
    for n, file in enumerate(files):
        vision.picture(n, SIZES[n]).save(file)
    inline = base64.b64encode(files[2].read_bytes()).decode()
    parts = [{"type": "image", "base64": inline}, {"type": "text", "text": "this?"}]
    return [
        {"prompt": "<image> what?", "images": ["0.png"], "answer": "a"},
        {"messages": [{"role": "user", "content": "say no"}], "answer": "b"},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}], "answer": "c"},
        {"prompt": "<image> or <image>?", "images": ["1.png", "3.png"], "answer": "d"},
    ]


def written(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(folder)))
    return file


def grpo(folder: Path, model: Path, method: Any = GRPOTrainer, **keys: Any) -> Any:
    source = written(folder.parent / "rows")
    defaults: dict[str, Any] = {
        "max_steps": 2, "micro_batch_size": 4, "optimizer": AdamW(lr=1e-3), "scheduler": Constant(),
        "logger": [JSONL()], "checkpoint": [], "log_every": 1, "rewards": [digest], "accelerator": "cpu",
        "output_dir": folder, "sampler": TransformersSampler(max_new_tokens=8), "group_size": 3,
    }  # fmt: skip
    network = HFModel(name_or_path=str(model), **keys.pop("network", {}))
    data = PromptData(sources=[source], eval_sources=[source], cache_dir=folder.parent / "cache", **keys.pop("data", {}))
    return method(model=network, data=data, **{**defaults, **keys})


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
@pytest.mark.parametrize("family", EVERY)
def test_at_first_nothing_has_moved(tmp_path: Path, model: Any, family: str, lora: Any) -> None:
    run = grpo(tmp_path / "run", model(family), beta=0.05, network={"lora": lora}, max_steps=1).train()
    assert run.loaders.ledger["total"]["images"] == 4
    assert run.last["policy/moved"] == 0.0
    assert run.last["kl"] == pytest.approx(0.0, abs=1e-9)
    assert run.last["sampler/gap"] < 1e-5
    assert run.last["sampler/max_ratio"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_the_curve_does_not_depend_on_the_cut_or_on_branching(tmp_path: Path, model: Any, family: str) -> None:
    cuts: dict[str, Any] = {"whole": (4, 1, True), "1x4": (1, 4, True), "padded": (2, 2, False)}
    for name, (micro, parts, branching) in cuts.items():
        cut = {"micro_batch_size": micro, "gradient_accumulation_steps": parts, "branching": branching}
        every = ["language", "projector", "tower"]
        grpo(tmp_path / name, model(family), beta=0.05, updates=2, network={"train": every}, eval_every=2, **cut).train()
        lines = [
            [{k: v for k, v in line.items() if k != "tokens"} for line in metrics(tmp_path / n)] for n in (name, "whole")
        ]
        near(*lines, name)
        assert replies(tmp_path / name) == replies(tmp_path / "whole")
