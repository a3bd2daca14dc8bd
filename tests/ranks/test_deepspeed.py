"""DeepSpeed from a recipe; that it gives what one process gives is shown in test_strategies.py."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import launched

import posttrain
from posttrain.errors import RecipeError

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")


@needs_deepspeed
def test_the_recipe_of_the_arctictraining_blog_trains(tmp_path: Path, tiny_model: Path, sums: Path) -> None:
    recipe = tmp_path / "blog.yaml"
    recipe.write_text(f"""
type: sft
micro_batch_size: 2
model:
  name_or_path: {tiny_model}
data:
  sources:
    - {sums}
deepspeed:
  zero_optimization:
    stage: 3
optimizer:
  lr: 1e-3
checkpoint:
  - type: huggingface
    save_end_of_training: true
    output_dir: {tmp_path}/fine-tuned-model
""")
    done: subprocess.CompletedProcess[str] = launched(
        [sys.executable, "-m", "posttrain.cli", "train", recipe, "accelerator=cpu", f"output_dir={tmp_path}/out"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "fine-tuned-model" / "config.json").read_text())["model_type"] == "llama"


def test_what_the_recipe_says_cannot_be_said_again_in_the_configuration() -> None:
    config: dict[str, Any] = {"gradient_clipping": 2.0, "train_batch_size": "auto", "bf16": {"enabled": True}}
    found = dict.fromkeys(message for _, message in posttrain.DeepSpeed(config=config).check())
    assert list(found) == [
        "'gradient_clipping' cannot be set here: the recipe says it with `max_grad_norm`",
        "'bf16' cannot be set here: the recipe says it with `precision`",
    ]


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'posttrain\[deepspeed\]'"):
        posttrain.DeepSpeed().build()


def test_a_process_alone_takes_another_port_if_its_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    from types import SimpleNamespace

    import torch
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    from posttrain.blocks.parallel import deepspeed

    monkeypatch.delenv("MASTER_PORT", raising=False)
    environment, tried = LightningEnvironment(), list[int]()

    def join() -> None:
        os.environ["MASTER_PORT"] = str(environment.main_port)
        tried.append(environment.main_port)
        if len(tried) == 1:
            raise torch.distributed.DistNetworkError("EADDRINUSE")

    alone = SimpleNamespace(cluster_environment=environment, world_size=1, _init_deepspeed_distributed=join)
    strategy = next(one for one in vars(deepspeed).values() if hasattr(one, "_join"))
    strategy._join(alone)
    assert len(set(tried)) == 2
    tried.clear()
    with pytest.raises(torch.distributed.DistNetworkError):
        strategy._join(SimpleNamespace(**{**vars(alone), "world_size": 2}))
