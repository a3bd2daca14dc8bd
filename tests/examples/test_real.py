"""A real pretrained model, fetched by pip: it answers, it is proven, it learns. Slow, and skipped where pip finds nothing."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct."""
    pytest.importorskip("gguf")
    fetched = subprocess.run(
        [sys.executable, str(EXAMPLES / "smollm2.py")], capture_output=True, text=True, check=False
    )  # fmt: skip
    if fetched.returncode:
        pytest.skip(f"the model could not be fetched: {fetched.stderr[-300:]}")
    return Path(fetched.stdout.split()[-1])


def test_it_says_what_the_capital_of_france_is(real: Path) -> None:
    from posttrain.blocks.models.exports import open_model
    from posttrain.tools.afterwards.chat import Talk

    conversation = Talk(open_model(str(real)), max_new_tokens=20, temperature=0)
    assert "Paris" in conversation.say("What is the capital of France?")
    assert "Rome" in conversation.say("And of Italy?")  # it knows what was asked before


def script(name: str) -> Any:
    """A script of examples/real: by its path, since other examples have a `make_data` too."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "real" / f"{name}.py")))


@pytest.fixture(scope="module")
def orders(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few messages, and the model that learned to read them by the recipe of `make demo-real`."""
    folder = tmp_path_factory.mktemp("orders")
    script("make_data").write(folder, train=48, held_out=8, more=24, asked=8)
    assert posttrain_("train", "recipe", folder, real, f"data.sources.0={folder}/train.jsonl", "output_dir=sft") == 0
    return folder


def posttrain_(command: str, recipe: str, folder: Path, model: Path, *overrides: str) -> int:
    """Run a command on a recipe of examples/real, in a folder."""
    from posttrain.cli import main

    where = [
        f"{key}={folder / value}" for key, _, value in (o.partition("=") for o in overrides) if key == "output_dir"
    ]
    rest = [override for override in overrides if not override.startswith("output_dir=")]
    twin = ["--twin"] if command == "check" else []
    return main(
        [command, str(EXAMPLES / "real" / f"{recipe}.yaml"), *twin, f"model.name_or_path={model}", *rest, *where]
    )


def losses(run: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_every_proof_holds(real: Path, orders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert posttrain_("check", "recipe", orders, real, f"data.sources.0={orders}/train.jsonl") == 0
    assert "FAIL" not in capsys.readouterr().out


def test_it_learns_to_read_orders(real: Path, orders: Path) -> None:
    """The loss falls at once, and held-out messages are read better."""
    from posttrain.tools.afterwards.evaluate import compare, evaluate

    found, check = losses(orders / "sft"), script("checks").same_json
    assert found[-1] < 0.3 * found[0]
    before, after = (
        evaluate(str(model), orders / "held.jsonl", check, max_new_tokens=60, output_dir=orders / "evals")
        for model in (real, orders / "sft")
    )
    compared = compare(before, after)
    assert (before.right.value, compared.worse) == (0, 0)
    assert compared.better >= 2


SHORT = {
    "distill": ["teacher.name_or_path={orders}/sft/huggingface", "data.sources.0={orders}/train.jsonl"],
    "swiftkv": ["data.sources.0={orders}/more.jsonl", "data.eval_sources=[]", "eval_every=null"],
    "speculator": ["data.sources.0={orders}/more.jsonl", "data.eval_sources=[]", "eval_every=null"],
}


@pytest.mark.parametrize("name", SHORT)
def test_other_methods_learn_on_it(name: str, real: Path, orders: Path) -> None:
    base = real if name == "distill" else orders / "sft" / "huggingface"
    overrides = [override.format(orders=orders) for override in SHORT[name]]
    short = ["max_steps=6", "micro_batch_size=1", "log_every=1", f"output_dir={name}"]
    assert posttrain_("train", name, orders, base, *overrides, *short) == 0
    found = losses(orders / name)
    assert found[-1] < 0.9 * found[0]


def test_it_prefers_right_orders_to_wrong_ones(orders: Path) -> None:
    rows = [json.loads(line) for line in (orders / "asked.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    pairs = [
        {"prompt": row["prompt"], "chosen": right, "rejected": wrong}
        for row, right, wrong in zip(rows, answers, [*answers[1:], answers[0]], strict=True)
    ]
    (orders / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = [f"data.sources.0={orders}/pairs.jsonl", "optimizer.lr=1e-4", "max_steps=4", "log_every=1", "output_dir=dpo"]
    assert posttrain_("train", "dpo", orders, orders / "sft" / "huggingface", *made) == 0
    found = losses(orders / "dpo")
    assert found[0] > 0.6931  # nothing is preferred yet: log 2, and what the right orders cost
    assert found[-1] < 0.9 * found[0]
