"""The chain of `make demo-distill`, made small: a base model, SwiftKV and a speculator, and what they save."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_chain_saves_what_its_table_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo"))
    monkeypatch.chdir(tmp_path)
    chain = load(EXAMPLES / "distill" / "demo.py")
    monkeypatch.setattr(chain.console, "_width", 160)
    small = ["accelerator=cpu", "micro_batch_size=4", "max_steps=60", "log_every=60", "eval_every=60"]
    found = chain.main(small, train=3_000, test=6)

    measured = tuple(found["costs"][1])
    assert measured == found["formulas"]
    assert found["costs"][1][0] < 0.45 * found["costs"][0][0]
    assert found["costs"][1][1] * 3 == found["costs"][0][1] * 2
    assert found["agreement"][0] == 1
    assert found["agreement"][2] >= found["agreement"][1]
    assert found["drafts"].tokens_per_step > 1.3
    shown = capsys.readouterr().out
    assert "tokens per pass, with drafts" in shown
    assert (tmp_path / "runs" / "distill" / "swiftkv" / "huggingface" / "model.safetensors").exists()


def load(file: Path):
    """Import an example by its path."""
    spec = importlib.util.spec_from_file_location(f"example_{file.parent.name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["swiftkv", "mlp_speculator"])
def test_the_script_and_the_recipe_are_the_same_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import posttrain
    from posttrain.values import as_data

    monkeypatch.chdir(tmp_path)
    for left in ("data", "base/huggingface"):  # what the steps before leave
        (tmp_path / "runs" / "distill" / left).mkdir(parents=True)
    for part in ("train", "test"):
        (tmp_path / "runs" / "distill" / "data" / f"{part}.jsonl").touch()
    assert as_data(load(EXAMPLES / name / "train.py").trainer) == as_data(
        posttrain.load(EXAMPLES / name / "recipe.yaml")
    )
