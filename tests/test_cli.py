"""The command line as a person meets it: output, messages, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, sums: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"type: sft\nmodel: {{name_or_path: {tiny_model}}}\ndata: {{sources: [{sums}], max_length: 128}}\n"
        f"accelerator: cpu\nmax_steps: 3\noutput_dir: {tmp_path}/run\n"
    )
    return file


def test_training_leaves_a_folder_that_says_everything(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "log_every=1"]) == 0
    output = capsys.readouterr().out
    assert "step 3/3" in output
    assert "finished" in output
    assert "supervised tokens" in output  # the ledger
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "versions.json", "ledger.json", "metrics.jsonl", "tensorboard", "huggingface"} <= names
    assert json.loads((run / "ledger.json").read_text())["total"]["rows_in"] == 24
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "supervised_tokens", "memory_gb"} <= lines[-1].keys()
    assert main(["plot", str(run), "-o", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_samples_are_printed_before_and_while_training(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = "callbacks=[{type: samples, prompts: ['1+1='], max_new_tokens: 3}]"
    assert main(["train", str(recipe), sample, "data.eval_split=0.2", "eval_every=2"]) == 0
    output = capsys.readouterr().out
    assert [step for step in (0, 2, 3) if f"step {step}  '1+1=' -> " in output] == [0, 2, 3]


def test_check_says_what_would_be_done(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe)]) == 0
    assert "valid sft recipe" in capsys.readouterr().out


def test_a_wrong_recipe_exits_with_2_and_no_traceback(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe), "optimizer.lr=fast", "data.sources.0.name_or_path=nowhere.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: expected a number, got 'fast'" in error
    assert "there is no file or folder nowhere.jsonl" in error
    assert "Traceback" not in error


def test_data_that_cannot_be_trained_on_exits_with_1(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "data.max_length=4"]) == 1
    assert "24 of 24 rows are longer than 4 tokens" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_a_message(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "model.name_or_path=/nowhere/model"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_says_how_to_give_one(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "bare")
    assert main(["train", str(recipe), f"tokenizer.name_or_path={tmp_path}/bare"]) == 1
    assert "tokenizer.chat_template" in capsys.readouterr().err
    assert main(["train", str(recipe), f"tokenizer.name_or_path={tmp_path}/bare", "tokenizer.chat_template=plain"]) == 0


def test_show_prints_a_recipe_that_runs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(recipe)]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert main(["check", str(resolved)]) == 0
    capsys.readouterr()
    assert main(["show", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "sft"


def test_show_data_marks_what_is_trained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(recipe), "--data", "1"]) == 0
    output = capsys.readouterr().out
    assert "[0][<|im_end|>]" in output.replace("\n", "")
    assert "assistant" in output
    assert main(["show", str(recipe), "--data", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert ["<|im_end|>", True, "assistant"] in lines[0]["tokens"]


def test_prepare_tokenizes_and_prints_the_ledger(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(recipe)]) == 0
    assert "24" in capsys.readouterr().out
    assert list((tmp_path / "cache").glob("*/manifest.json"))


def test_blocks_explains_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.registry import KINDS, names

    assert main(["blocks"]) == 0
    for kind in KINDS:
        assert main(["blocks", kind]) == 0
        for name in names(kind):
            assert main(["blocks", kind, name]) == 0
    capsys.readouterr()
    assert main(["blocks", "optimizer", "adamw"]) == 0
    output = capsys.readouterr().out
    assert "lr: " in output
    assert "Peak learning rate." in output
    assert main(["blocks", "optimiser"]) == 2
    assert "did you mean 'optimizer'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}\n", "{bad\n"])
def test_a_run_that_cannot_be_plotted_is_a_message(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["plot", str(tmp_path)]) == 1
    assert "metrics.jsonl" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "nowhere")]) == 1


def test_the_file_itself_can_be_run(recipe: Path) -> None:
    """As `fabric run posttrain/cli.py` does."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "posttrain" / "cli.py", "check", recipe],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom posttrain.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lightning", "numpy", "rich", "yaml", "attrs"} & set(done.stdout.split())
