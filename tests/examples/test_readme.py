"""What the README shows runs as written, and what two of its pages show; only the model is a tiny one."""

import json
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain import cli

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "README.md").read_text()
MODEL = "Qwen/Qwen3-0.6B"


def code(language: str, containing: str, page: str = "README.md") -> str:
    """Return the one block of a page in a language that contains a text."""
    blocks = [block.partition("\n") for block in (ROOT / page).read_text().split("```")[1::2]]
    found = [text for title, _, text in blocks if title == language and containing in text]
    assert len(found) == 1, f"{len(found)} {language} blocks contain {containing!r}"
    return found[0]


@pytest.fixture
def write(tmp_path: Path, tiny_model: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Write a file into a folder that has chats, and make that folder the current one."""
    sums.rename(tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text.replace(MODEL, str(tiny_model)))
        return path

    return written


def test_the_python_example_and_the_recipe_are_the_same_run(write: Callable[[str, str], Path]) -> None:
    from_python = runpy.run_path(str(write("first.py", code("python", "SFTTrainer("))))["run"]
    recipe = write("first.yaml", code("yaml", "type: sft"))
    from_recipe = posttrain.load(recipe, ["resume=never"]).train()
    assert from_python.step == from_recipe.step > 0
    assert from_python.last["loss"] == from_recipe.last["loss"]
    assert {**from_python.recipe, "resume": ""} == {**from_recipe.recipe, "resume": ""}


def test_the_trainer_of_ones_own_trains(write: Callable[[str, str], Path]) -> None:
    write("focal.py", code("python", "FocalTrainer"))
    first = code("yaml", "type: sft")
    recipe = write("focal.yaml", first.replace("type: sft", "code: focal.py\ntype: focal\ngamma: 1.5"))
    run = posttrain.load(recipe).train()
    assert 0 < run.last["confidence"] < 1
    assert run.recipe["gamma"] == 1.5


def test_dpo_goes_on_from_the_first_run_and_the_loss_of_ones_own_trains(write: Callable[[str, str], Path]) -> None:
    posttrain.load(write("first.yaml", code("yaml", "type: sft"))).train()
    write(
        "pairs.jsonl",
        "".join(json.dumps({"prompt": f"{n}?", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(9)),
    )
    dpo = code("yaml", "type: dpo", "docs/preferences.md")
    assert posttrain.load(write("dpo.yaml", dpo)).train().last["loss"] > 0
    write("linear.py", code("python", "preference_loss", "docs/preferences.md"))
    own = dpo.replace("loss_type: {sigmoid: 1, sft: 0.2}", "code: linear.py\nloss_type: linear")
    run = posttrain.load(write("own.yaml", own), ["output_dir=runs/own"]).train()
    assert run.last["loss"] == pytest.approx(-run.last["rewards/margin"], abs=1e-6)


def test_the_pipeline_makes_pairs(write: Callable[[str, str], Path], server: Any) -> None:
    from synth_server import by_length, saying

    from posttrain.synth import OpenAISynth

    server.answer = saying(by_length)
    client = OpenAISynth(base_url=server.url, api_key="sk-of-a-test", mode="online", work_dir=Path("runs"))
    code_of = code("python", "pipeline = (", "docs/synth.md").replace("margin=0.5", "margin=0")
    exec(code_of, {"client": client})
    (row,) = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert row["score_chosen"] > row["score_rejected"]


def test_the_callback_runs(write: Callable[[str, str], Path]) -> None:
    clamp = runpy.run_path(str(write("clamp.py", code("python", "clamp", "docs/trainer.md"))))["clamp"]
    trainer = posttrain.load(write("first.yaml", code("yaml", "type: sft")), ["max_steps=1"])
    assert trainer.train(callbacks=[clamp]).last["loss"] <= 10


def test_the_commands_exist() -> None:
    blocks = [text for text in TEXT.split("```")[1::2] if text.startswith("bash\n")]
    lines = [shlex.split(line, comments=True) for text in blocks for line in text.splitlines() if "posttrain " in line]
    lines = [line for line in lines if line[0] == "posttrain"]
    assert len(lines) >= 6
    for _, *arguments in lines:
        cli.parse_arguments(arguments)


def test_the_file_tree_names_every_folder_and_it_is_a_page() -> None:
    tree = code("", "posttrain/\n  trainer.py")
    root = Path(posttrain.__file__).parent
    assert len(TEXT.splitlines()) <= 150
    for folder in {path.parent for path in root.rglob("*.py")} - {root}:
        assert f"{folder.name}/" in tree, f"{folder.relative_to(root)} is not in the README's tree"
