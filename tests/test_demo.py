"""What a newcomer meets first: the demo, and the code in the README."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import posttrain

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_demo_runs_from_data_to_picture(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / "demo" / "demo.py", "max_steps=6", "eval_every=3", "accelerator=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exactly right" in done.stdout
    run = tmp_path / "runs" / "demo" / "run"
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "huggingface" / "model.safetensors").exists()


def test_held_out_questions_of_the_demo_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo"))
    import make_data

    make_data.make(tmp_path, train=500, test=50)
    train, test = (set((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test"))
    assert len(test) > 40
    assert not train & test


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_code_in_the_readme_runs(
    tmp_path: Path, tiny_model: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sums.rename(tmp_path / "chats.jsonl")
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3-0.6B").symlink_to(tiny_model)
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "runs" / "first" / "huggingface").is_dir()
    (recipe,) = blocks("yaml")
    (tmp_path / "first.yaml").write_text(recipe.replace("runs/first", "runs/second"))
    assert posttrain.load("first.yaml").train().status == "finished"


def test_every_file_is_named_in_the_readme() -> None:
    tree = README[README.index("## Where everything is") :]
    for file in (ROOT / "posttrain").rglob("*.py"):
        assert file.name == "__init__.py" or file.name in tree, file.name
