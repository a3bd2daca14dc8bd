"""ZeRO on two CPU ranks gives what one process gives. Needs the extra `deepspeed`; see CONTRIBUTING."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_ranks import ROOT, launched
from toy import losses, trainer

import posttrain
from posttrain.errors import RecipeError

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import posttrain
from toy import trainer
if __name__ == "__main__":
    trainer(
        Path(sys.argv[1]), micro_batch_size=1, gradient_accumulation_steps=2, devices=2, max_grad_norm=0.5,
        checkpoint=[posttrain.HuggingFace()],
        strategy=posttrain.DeepSpeed(config={{"zero_optimization": {{"stage": int(sys.argv[2])}}}}),
    ).train()
"""


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_trains_and_exports_like_one_process(tmp_path: Path, stage: int) -> None:
    from safetensors.torch import load_file

    trainer(tmp_path / "alone", max_grad_norm=0.5).train()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    done = launched([sys.executable, script, tmp_path / "two", stage])
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    ours, theirs = (load_file(tmp_path / name / "huggingface" / "model.safetensors") for name in ("alone", "two"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


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


@pytest.mark.skipif(bool(importlib.util.find_spec("deepspeed")), reason="deepspeed is installed")
def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pip install 'posttrain\[deepspeed\]'"):
        trainer(tmp_path, strategy=posttrain.DeepSpeed()).train()
