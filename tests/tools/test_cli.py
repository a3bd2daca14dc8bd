"""The command line as a person meets it: output, messages, exit codes."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import toy
from rich.console import Console

from posttrain.blocks.data.data import Preview
from posttrain.blocks.loggers.console import ConsoleLogger
from posttrain.blocks.loggers.logger import JSONL
from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.hooks import after
from posttrain.registry import block
from posttrain.tools.plot import smooth
from posttrain.tools.show import tokens
from posttrain.trainer import Trainer
from posttrain.trainers.sft import SFTTrainer

ROOT = Path(__file__).parent.parent.parent


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
    assert json.loads((run / "versions.json").read_text())["documents kept apart by"] == "packed attention"
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
    output = capsys.readouterr().out
    assert "valid" in output
    assert "sft (SFTTrainer)" in output
    assert "3 steps, each step 1 row per device" in output


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
    assert "there is no folder /nowhere/model" in capsys.readouterr().err
    assert main(["train", str(recipe), "model.name_or_path=nowhere/model"]) == 2
    assert "(there is no folder 'nowhere/model' here, so it was looked for on the hub)" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_says_how_to_give_one(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokens import byte_tokenizer

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
    assert "[0<|im_end|>]" in output
    assert "assistant" in output
    assert "1 document, 26 tokens, 2 supervised (7.7%)" in output
    assert main(["show", str(recipe), "--data", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert {"text": "<|im_end|>", "supervised": True, "role": "assistant"} in lines[0]["tokens"]


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


def test_overrides_may_stand_between_options(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(recipe), "seed=1", "--json", "max_steps=2k"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["seed"], shown["max_steps"]) == (1, 2000)
    for wrong in (
        ["check", str(recipe), "--fast"],
        ["show", str(recipe), "--json", "fast"],
        ["blocks", "a", "b", "c=1"],
    ):
        with pytest.raises(SystemExit) as usage:
            main(wrong)
        assert usage.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_the_number_of_documents_must_be_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "-1", "x", "²"):
        with pytest.raises(SystemExit):
            main(["show", str(recipe), "--data", wrong])
    assert "how many?" in capsys.readouterr().err


def test_several_problems_are_counted_and_begin_their_lines(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text() + "sed: 1\nepochs: 0\n")
    assert main(["check", str(recipe)]) == 2
    assert capsys.readouterr().err.startswith(f"error: 2 problems\n{recipe}:7: sed: ")


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_a_rank_leaves_the_word_about_a_recipe_to_the_first(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str
) -> None:
    from posttrain.runtime import failures

    waited: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert main(["train", str(recipe), "seed=x"]) == 2
    assert waited == [failures.PATIENCE], "a launcher ends all ranks when one has ended"
    said = "seed" in capsys.readouterr().err
    assert said == (local_rank == "0"), "a machine that is left to itself says what is wrong there"


def test_the_traceback_is_there_for_those_who_ask(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_TRACEBACK", "1")
    with pytest.raises(RecipeError):
        main(["check", str(recipe), "seed=x"])


def test_a_run_that_a_signal_ended_exits_as_shells_expect(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        signal = 15

    monkeypatch.setattr(Trainer, "train", lambda self: Ended())
    assert main(["train", str(recipe)]) == 143


def test_a_pipe_that_is_closed_early_is_no_error(recipe: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m posttrain.cli blocks trainer sft | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("trainer: sft")
    assert "Error" not in done.stderr


def test_checking_a_recipe_imports_nothing_heavy(recipe: Path) -> None:
    code = f"import sys\nfrom posttrain.cli import main\nmain(['check', {str(recipe)!r}])\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lightning", "numpy", "datasets", "pyarrow", "rich"} & set(done.stdout.split())


def test_no_secret_reaches_output_or_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CANARY", "hunter2")
    recipe.write_text(recipe.read_text().replace("model: {", "model: {token: '${CANARY}', "))
    for command in (["check"], ["show"], ["show", "--json"], ["train"]):
        assert main([command[0], str(recipe), *command[1:]]) == 0
    assert main(["train", str(recipe), "model.name_or_path=/nowhere", "resume=never"]) == 2
    found = capsys.readouterr()
    assert "${CANARY}" in found.out
    assert "hunter2" not in found.out + found.err
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


Token = tuple[str, bool, str]
TOKENS: list[Token] = [
    ("<|im_start|>", False, "user"), ("a\n", False, "user"), ("[bold]x", True, "assistant"), ("\x07", True, "assistant"),
    ("<|im_end|>", True, "assistant"), ("\n", False, ""),
]  # fmt: skip


def shown(terminal: bool) -> str:
    console = Console(force_terminal=terminal, width=100, color_system="256" if terminal else None, file=io.StringIO())
    tokens([Preview("a.jsonl:1", TOKENS), Preview("a.jsonl:2", TOKENS)], console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tokens_can_be_read_without_a_terminal() -> None:
    found = shown(terminal=False)
    assert "      user <|im_start|>a" in found
    assert r" assistant [[bold]x\x07<|im_end|>]" in found
    assert "a.jsonl:2  6 tokens, 3 supervised --" in found
    assert "2 documents, 12 tokens, 6 supervised (50.0%)" in found


def test_tokens_on_a_terminal_show_where_each_one_ends() -> None:
    green, bright = "\x1b[30;48;5;40m", "\x1b[30;48;5;46m"
    found = shown(terminal=True)
    assert f"{green}[bold]x\x1b[0m{bright}\\x07\x1b[0m{green}<|im_end|>" in found
    assert "a↵" in found


def metrics(folder: Path, steps: int, **more: float) -> Path:
    folder.mkdir()
    lines = [
        {"step": s, "loss": 2 / s, "lr": 1e-5, **({"eval_loss": 3 / s} if s % 5 == 0 else {}), **more}
        for s in range(1, steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_several_runs_go_into_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = metrics(tmp_path / "one", 100, grad_norm=1.0), metrics(tmp_path / "two", 7, reward=0.5)
    assert main(["plot", str(one), str(two)]) == 0
    assert (one / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (
        main(["plot", str(two), "-o", str(tmp_path / "new" / "x.svg"), "--metric", "reward", "--metric", "loss"]) == 0
    )
    assert "Reward" in (tmp_path / "new" / "x.svg").read_text()
    capsys.readouterr()
    assert main(["plot", str(two), "--metric", "rewards"]) == 2
    assert "did you mean 'reward'?" in capsys.readouterr().err
    assert main(["plot", str(two), "-o", str(tmp_path / "x.doc")]) == 1
    assert "x.doc cannot be written" in capsys.readouterr().err


def test_a_damaged_line_of_metrics_is_named_unless_it_is_still_being_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = metrics(tmp_path / "run", 9)
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 9, "lo')
    assert main(["plot", str(run)]) == 0
    file.write_text(file.read_text().replace('"step": 3', '"step: 3'))
    assert main(["plot", str(run)]) == 1
    assert "metrics.jsonl:3: not JSON" in capsys.readouterr().err


def test_the_mean_of_a_straight_line_is_that_line() -> None:
    line = [float(i) for i in range(200)]
    assert smooth(line)[20:150] == pytest.approx(line[20:150])
    assert smooth([1.0]) == [1.0]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom posttrain.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lightning", "numpy", "rich", "yaml", "attrs"} & set(done.stdout.split())


def test_doctor_says_what_is_there_and_what_is_missing_for_what(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import posttrain.tools.doctor

    monkeypatch.setattr(posttrain.tools.doctor, "installed", lambda package: None if package == "peft" else "1.2.3")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "for model.lora: pip install 'posttrain[peft]'" in said
    assert re.search(r"torch +1\.2\.3", said)
    assert "gloo" in said
    assert "cache" in said


def test_a_warning_of_the_hub_is_printed_once() -> None:
    code = (
        "from posttrain.cli import main; main(['blocks', 'model']); from huggingface_hub.utils import logging; "
        "logging.get_logger('huggingface_hub.here').warning('only once')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.count("only once") == 1


def test_the_line_of_a_step_shows_metrics_of_ones_own_and_is_not_broken(tmp_path: Path) -> None:
    out = io.StringIO()

    @block("logger", "test-captured")
    class Captured:
        def build(self, run: Any) -> Any:
            return ConsoleLogger(run, Console(file=out, width=60))

    @after("trainer.loss")
    def confident(trainer: Any, loss: Any) -> None:
        trainer.run.log(confidence=0.25, certainty_of_the_whole_model=0.5)

    keys: dict[str, Any] = {"logger": [Captured(), JSONL()], "rows": 60, "packing": False, "max_steps": 4}
    run = toy.trainer(tmp_path, eval_rows=5, eval_every=2, **keys).train(callbacks=[confident])
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    assert all("confidence 0.2500  certainty_of_the_whole_model 0.5000" in line for line in lines)
    assert "eval_loss" in lines[1]
    assert "epoch 0.13" in lines[1]  # 8 of 60 rows
    assert re.search(r"epochs\s+0.267", out.getvalue())
    assert run.epochs == pytest.approx(16 / 60)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in written] == pytest.approx([4 / 60, 8 / 60, 12 / 60, 16 / 60])
    assert all(0 <= time.time() - line["time"] < 3600 for line in written)


def test_the_bar_follows_the_run_between_logs_and_through_an_evaluation(tmp_path: Path) -> None:
    run = toy.trainer(tmp_path, max_steps=1).train()
    logger = ConsoleLogger(run, Console(file=io.StringIO(), force_terminal=True))
    try:
        run.step = 7
        with run.unmeasured("evaluating"):
            logger.progress.get_renderable()
            (task,) = logger.progress.tasks
            assert (task.completed, task.fields["doing"]) == (7, "evaluating")
        logger.progress.get_renderable()
        assert task.fields["doing"] == ""
    finally:
        logger.finalize("finished")


def test_a_trainer_written_for_another_library_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Theirs defines compute_loss, which is never called here: define loss\(self"):

        class Theirs(SFTTrainer):
            def compute_loss(self, model: Any, inputs: Any) -> Any:
                """As in TRL."""

    class Ours(SFTTrainer):
        def loss(self, batch: Any) -> Any:
            return self.compute_loss(batch)

        def compute_loss(self, batch: Any) -> Any:
            """A helper of that name is fine."""
