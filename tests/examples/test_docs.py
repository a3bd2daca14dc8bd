"""What the documentation shows runs as written; only the model is a tiny one. (The README's parts: test_readme.py.)"""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain
from posttrain import cli
from posttrain.errors import PosttrainError

ROOT = Path(__file__).parent.parent.parent
PAGES = {str(page.relative_to(ROOT / "docs")): page.read_text() for page in sorted((ROOT / "docs").rglob("*.md"))}
MODEL = "Qwen/Qwen3-0.6B"
RECIPE = """\
type: sft
model: {name_or_path: MODEL}
data: {sources: [chats.jsonl], max_length: 64}
micro_batch_size: 2
max_steps: 1
logger: []
output_dir: OUTPUT
"""


def code(page: str, language: str) -> list[str]:
    """Return a page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with chats, to be in."""
    sums.rename(tmp_path / "chats.jsonl")
    (tmp_path / "verdicts.jsonl").write_text('{"prompt": "1+1=", "completion": "3", "label": false}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "yaml")])
def test_recipes_are_valid(page: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.blocks.data.verifiers.installed", lambda: True)
    for python in code(page, "python"):
        for name in re.findall(r'(?:@posttrain.block\("\w+", "|@reward\("|@agent\("|@tool\ndef )([\w-]+)', python):
            Path(f"{name}.py").write_text(python)
    Path("held.jsonl").write_text(Path("chats.jsonl").read_text())
    Path("pairs.jsonl").write_text('{"prompt": "?", "chosen": "yes", "rejected": "no"}\n')
    for number, text in enumerate(code(page, "yaml")):
        file = Path(f"recipe-{number}.yaml")
        file.write_text(text.replace(MODEL, str(tiny_model)))
        for earlier in re.findall(r"runs/\w+/huggingface", text):
            Path(earlier).mkdir(parents=True, exist_ok=True)
        posttrain.load(file)


def test_the_block_trains(tiny_model: Path) -> None:
    optimizer, *_ = code("block.md", "python")
    Path("momentum_again.py").write_text(optimizer.replace('"momentum"', '"momentum-again"'))
    recipe = (
        code("block.md", "yaml")[0].replace("momentum.py", "momentum_again.py").replace("momentum,", "momentum-again,")
    )
    Path("recipe.yaml").write_text(recipe.replace(MODEL, str(tiny_model)))
    run = posttrain.load("recipe.yaml", ["max_steps=2", "data.max_length=64"]).train()
    assert type(run.optimizer.optimizer).__name__ == "SGD"  # type: ignore[attr-defined]


def test_the_data_block_reads_tickets(tiny_model: Path) -> None:
    *_, tickets = code("block.md", "python")
    Path("tickets.py").write_text(tickets)
    Path("tickets.jsonl").write_text(json.dumps({"ticket": "It is broken", "answer": "Turn it off and on"}) + "\n")
    Path("recipe.yaml").write_text(
        "code: tickets.py\n" + RECIPE.replace("MODEL", str(tiny_model)).replace("data: {", "data: {type: tickets, ")
    )
    ledger = posttrain.load("recipe.yaml", ["data.sources.0=tickets.jsonl"]).prepare()
    assert ledger["total"]["documents"] == 1


def test_sample_rows_can_be_trained_on(tiny_model: Path) -> None:
    """The template of the tiny model knows no tools and no thoughts: those rows are only understood."""
    from posttrain.blocks.data.rows.schemas import conversation

    chats, same, pairs = code("data.md", "json")
    rows = [json.loads(line) for text in (chats, same) for line in text.splitlines()]
    found = [conversation(row) for row in rows]
    assert [len(one["messages"]) for one in found] == [3, 2, 4, 3, 3, 3, 3]
    assert all(one["messages"] == found[0]["messages"] for one in found[3:])
    for kind, lines in (("sft", [rows[0], *rows[3:]]), ("dpo", [json.loads(line) for line in pairs.splitlines()])):
        for number, row in enumerate(lines):
            Path(f"{kind}-{number}.jsonl").write_text(json.dumps(row) + "\n")
            recipe = RECIPE.replace("MODEL", str(tiny_model)).replace("type: sft", f"type: {kind}")
            Path("recipe.yaml").write_text(recipe.replace("chats.jsonl", f"{kind}-{number}.jsonl"))
            total = posttrain.load("recipe.yaml", ["data.max_length=128"]).prepare()["total"]
            assert total.get("documents", total.get("pairs")) == 1


def test_the_trainer_with_a_teacher_begins_at_no_distance(tiny_model: Path) -> None:
    (text,) = [text for text in code("trainer.md", "python") if "kl-to-teacher" in text]
    Path("kl.py").write_text(text)
    recipe = RECIPE.replace("MODEL", str(tiny_model)).replace("type: sft", "type: kl-to-teacher\ncode: kl.py")
    Path("recipe.yaml").write_text(recipe + f"teacher: {{name_or_path: {tiny_model}}}\n")
    assert posttrain.load("recipe.yaml").train().last["loss"] == pytest.approx(0, abs=1e-6)


def test_the_loss_of_two_terms_trains_and_logs_both(tiny_model: Path) -> None:
    (text,) = [text for text in code("trainer.md", "python") if "confidence-penalty" in text]
    Path("penalty.py").write_text(text)
    recipe = RECIPE.replace("MODEL", str(tiny_model)).replace("type: sft", "type: confidence-penalty\ncode: penalty.py")
    Path("recipe.yaml").write_text(recipe)
    last = posttrain.load("recipe.yaml").train().last
    assert last["loss"] == pytest.approx(last["nll"] + 0.1 * last["negative_entropy"], rel=1e-5)


ERRORS = re.findall(r"<!-- error (.*?) -->\n```text\n(.*?)```", PAGES["faq.md"], re.S)


@pytest.mark.parametrize(("override", "said"), ERRORS, ids=[override.partition("=")[0] for override, _ in ERRORS])
def test_the_commonest_errors_are_as_quoted(override: str, said: str, tiny_model: Path) -> None:
    Path("odd.jsonl").write_text('{"q": "a", "b": "c"}\n')
    Path("recipe.yaml").write_text(RECIPE.replace("MODEL", str(tiny_model)).replace("OUTPUT", "run"))
    posttrain.load("recipe.yaml").train()
    with pytest.raises(PosttrainError) as error:
        posttrain.load("recipe.yaml", [override]).train()
    for line in said.splitlines():
        assert line in str(error.value)


def test_commands_exist() -> None:
    lines = [line for page in PAGES for text in code(page, "bash") for line in text.splitlines()]
    ours = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("posttrain ")]
    assert len(ours) >= 5
    for arguments in ours:
        cli.parse_arguments(arguments)


def test_the_reward_of_the_page_scores(tmp_path: Path) -> None:
    from posttrain.blocks.rollouts.replies import Failure, Reply, Sample
    from posttrain.registry import lookup

    (text,) = [text for text in code("rl.md", "python") if "rank-of-length" in text]
    Path("ranks.py").write_text(text)
    runpy.run_path("ranks.py")
    samples = [Sample("", text, {}, [], Reply([], [], True)) for text in ("abc", "", "a")]
    found = lookup("reward", "rank-of-length")().build(None)(samples)
    assert found == [1 - 2 / 3, Failure("it is empty"), 1 - 1 / 3]


def test_the_environment_of_the_page_answers() -> None:
    from posttrain.blocks.rollouts.replies import Turn
    from posttrain.registry import lookup

    (text,) = [text for text in code("rl.md", "python") if '"guess"' in text]
    Path("guess.py").write_text(text)
    runpy.run_path("guess.py")
    game = lookup("environment", "guess")().reset({"number": "7"})
    answers = [game.step(Turn(said)) for said in ("five", "5", "9", "7")]
    told = [[m["content"] for m in one.messages] for one in answers]
    assert told == [["A number, please."], ["higher"], ["lower"], []]
    assert [one.reward for one in answers] == [0, 0, 0, 1.2]


def test_scripts_of_pages_run(folder: Path) -> None:
    """Blocks of one's own can be imported as they stand."""
    for page in ("block.md", "trainer.md"):
        for number, text in enumerate(code(page, "python")):
            file = folder / f"{page.removesuffix('.md')}{number}.py"
            again = re.sub(r'(block\("\w+", ")', r"\1again-", text).replace('("curriculum", ', '("again-curriculum", ')
            file.write_text(again.replace('kind("curriculum")', 'kind("again-curriculum")'))
            runpy.run_path(str(file))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(folder: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loop = (folder / "site" / "architecture.html").read_text()
    assert "# trainer.step" in re.sub("<.*?>", "", loop)
    outside = [
        address
        for page in (folder / "site").rglob("*.html")
        for address in re.findall(r'(?:src|href)="(https?://[^"]+)"', page.read_text())
        if re.search(r"\.(js|css|woff2?)$|fonts\.", address)
    ]
    assert not outside  # it can be read without a network
