"""`posttrain synth` and the example, as a user runs them."""

import json
import re
import runpy
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.blocks.data.rows.pairs import pair
from posttrain.blocks.data.rows.schemas import conversation
from posttrain.synth.steps.verify import last_number

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "synth"


ONE_BY_ONE = "client.concurrency=1"
"""What the server says depends on what it was asked before: else all pairs of a recipe might be ties, now and then."""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = runpy.run_path(str(EXAMPLE / "server.py"))["serve"](0)
    threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True).start()
    shutil.copytree(EXAMPLE, tmp_path / "examples" / "synth")
    shutil.copy(EXAMPLE / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_the_recipe_runs_once_and_is_exported_for_the_trainers(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"client.base_url={url}"
    assert cli.main(["synth", "plan", "recipe.yaml", base]) == 0
    assert "6 requests: 0 cached" in capsys.readouterr().out
    assert cli.main(["synth", "run", "recipe.yaml", base]) == 0
    assert "6 rows in runs/synth/greetings.jsonl" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("runs/synth/greetings.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["Clara", "Clara", "Justin", "Justin", "Terry", "Terry"]
    assert rows[2]["response"].endswith(", Justin!")
    assert rows[2]["prompt"][0] == {"role": "system", "content": "You are polite."}
    assert cli.main(["synth", "run", "recipe.yaml", "client.base_url=http://127.0.0.1:9/v1", base]) == 0
    assert "6 cached, 0 under way, 0 refused, 0 new" in capsys.readouterr().out
    for verb, said in (("status", "6 of 6 done"), ("errors", "no failures")):
        assert cli.main(["synth", verb, "recipe.yaml", base]) == 0
        assert said in capsys.readouterr().out
    assert cli.main(["synth", "export", "recipe.yaml", base, "-o", "all.parquet"]) == 0
    assert Path("all.parquet").exists()
    assert cli.main(["synth", "view", "recipe.yaml", base]) == 0
    assert rows[2]["response"] in Path("runs/synth/say_hello/view.html").read_text()
    assert b"sk-from-the-environment" not in b"".join(p.read_bytes() for p in Path().rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["ultrafeedback", "self_instruct", "clean", "rejection"])
def test_a_preset_runs_as_written_and_can_be_trained_on(
    url: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["synth", "run", f"examples/synth/{name}.yaml", f"client.base_url={url}", ONE_BY_ONE]
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in Path(f"runs/synth/{name}.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:  # as the data blocks read it
        if name == "ultrafeedback":
            assert len(pair(row).conversations) == 2
            assert row["margin"] >= 0.25
        else:
            assert conversation(row)["messages"][-1]["role"] == "assistant"
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "requests: 0 cached" not in capsys.readouterr().out
    assert [json.loads(line) for line in Path(f"runs/synth/{name}.jsonl").read_text().splitlines()] == rows
    if name == "rejection":
        assert all(last_number(row["response"]) == last_number(row["answer"]) for row in rows)
        assert len({(row["question"], row["response"]) for row in rows}) == len(rows)
    if name == "clean":
        assert all(row["score"] >= 4 for row in rows)
        dropped = Path("runs/synth/clean.dropped.jsonl").read_text().splitlines()
        reasons = {json.loads(line)["dropped"]["reason"] for line in dropped}
        assert "nearly a duplicate of an earlier row" in reasons
        assert cli.main(["synth", "export", *command[2:], "--dropped", "-o", "dropped.parquet"]) == 0
        assert f"{len(dropped)} rows in dropped.parquet" in capsys.readouterr().out
        assert cli.main(["synth", "view", "runs/synth/clean", "-o", "page.html"]) == 0
        assert "a duplicate of an earlier row" in Path("page.html").read_text()


@pytest.mark.parametrize("name", sorted(file.stem for file in (EXAMPLE / "presets").glob("*.yaml")))
def test_a_preset_of_the_literature_runs_as_written_names_its_paper_and_can_be_trained_on(
    url: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(f"examples/synth/presets/{name}.yaml")
    assert re.search(r"arXiv:\d{4}\.\d{5}", recipe.read_text())
    assert len(recipe.read_text().splitlines()) <= 60  # a page
    address = f"[{url}]" if "type: vllm" in recipe.read_text() else url
    command = ["synth", "run", str(recipe), f"client.base_url={address}", ONE_BY_ONE]
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in Path(f"runs/synth/{name}.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:  # as the data blocks read it
        if name == "constitution":
            assert len(pair(row).conversations) == 2
        else:
            assert conversation(row)["messages"][-1]["role"] == "assistant"
    if name == "tools":
        assert all(any(m["role"] == "tool" for m in row["messages"]) and row["tools"] for row in rows)
    if name == "tree_search":
        assert all(last_number(row["response"]) == last_number(row["answer"]) for row in rows)
        assert all(0 <= step["value"] <= 1 for row in rows for step in row["steps"])
    if name == "evol_instruct":
        assert all("words" in conversation(row)["messages"][0]["content"] for row in rows)
    capsys.readouterr()
    assert cli.main(command) == 0  # and a second time sends nothing
    assert not re.search(r"[1-9][\d,]* new", capsys.readouterr().out)
    assert [json.loads(line) for line in Path(f"runs/synth/{name}.jsonl").read_text().splitlines()] == rows


def test_a_page_shows_how_a_run_goes_and_stops_to_reload_when_it_is_over(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.synth.pipelines import live_page

    pages: list[str] = []
    written = live_page.LivePage.write

    def write(self: live_page.LivePage, now: str, again: int = 0) -> None:
        written(self, now, again)
        pages.append(Path("live.html").read_text())

    monkeypatch.setattr(live_page, "EVERY", 1e-6)
    monkeypatch.setattr(live_page.LivePage, "write", write)
    command = ["synth", "run", "examples/synth/ultrafeedback.yaml", f"client.base_url={url}", "--live", "live.html"]
    assert cli.main(command) == 0
    assert "to watch it: file:///" in capsys.readouterr().out
    assert any('http-equiv="refresh"' in page and "in flight" in page for page in pages)
    assert any("1 generate" in page and "2 judge" not in page for page in pages)
    assert "The run is over." in pages[-1]
    assert "3 pair" in pages[-1]
    assert 'http-equiv="refresh"' not in pages[-1]


def test_everything_wrong_with_a_recipe_is_said_at_once(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["client.mode=sometimes", "steps.0.n=0", "output=a.txt", "sauce=1", "client.api_key=sk-plain-text"]
    assert cli.main(["synth", "run", "recipe.yaml", *wrong]) == 2
    told = capsys.readouterr().err
    for part in (
        "client.mode: expected one of batch, online",
        "steps.0.n: must be > 0",
        "sauce",
        "did you mean 'source'",
        "client.api_key: give the name",
    ):
        assert part in told
    assert "sk-plain-text" not in told


def test_a_column_that_is_not_there_is_said_with_the_row(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["synth", "plan", "recipe.yaml", "steps.0.messages.1.content=Hello {nam}"]) == 1
    assert "0-source.jsonl:1: there is no column 'nam'; did you mean 'name'?" in capsys.readouterr().err


def test_a_bound_on_the_command_line_is_held(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["synth", "run", "recipe.yaml", f"client.base_url={url}", "--max-requests", "5"]) == 1
    assert "passes max_requests=5; nothing was sent" in capsys.readouterr().err


def test_the_example_runs_as_written(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    for said in ("3 new", "3 cached"):
        namespace = runpy.run_path(str(EXAMPLE / "hello.py"))
        out = capsys.readouterr().out
        assert said in out
        assert ", Justin!" in out
    assert namespace["client"].status("say_hello").done == 3


def test_the_verbs_of_the_command_line_are_the_commands() -> None:
    from posttrain.synth.commands import COMMANDS

    assert set(cli.SYNTH_VERBS) == set(COMMANDS)


def test_public_names() -> None:
    import posttrain.synth

    assert all(getattr(posttrain.synth, name) is not None for name in posttrain.synth.__all__)
    assert posttrain.OpenAISynth is posttrain.synth.OpenAISynth


def test_the_first_rows_show_what_is_asked_and_answered_and_what_all_will_cost(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [
        "recipe.yaml",
        f"client.base_url={url}",
        "client.mode=batch",
        "client.prices.toy={input: 100, output: 100}",
    ]
    assert cli.main(["synth", "run", *recipe, "--first", "1"]) == 0
    told = capsys.readouterr().out
    assert "-- step 1 (generate), request 1 of 1, to toy" in told
    assert "[system] You are polite." in told
    assert "[user] Generate greetings to Clara" in told
    assert len(re.findall(r"^=> Good \w+, Clara!$", told, re.M)) == 2
    assert "Justin" not in told
    (tokens, cost) = re.findall(r"1 of 3 rows went through; all are going to use about (\d+) tokens: \$([\d.]+)", told)[
        0
    ]
    assert float(cost) == pytest.approx(int(tokens) * 100 / 2 / 1e6, rel=0.01)  # in batches, at half the price
    assert not Path("runs/synth/greetings.jsonl").exists()
    recipe.remove("client.mode=batch")
    assert cli.main(["synth", "plan", *recipe]) == 0
    assert "6 requests: 2 cached" in capsys.readouterr().out


def test_the_first_rows_of_a_pipeline_with_a_judge(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["synth", "run", "examples/synth/ultrafeedback.yaml", f"client.base_url={url}", "--first", "2"]) == 0
    )
    told = capsys.readouterr().out
    assert "step 2 (judge), request 1 of 32, to judge" in told
    assert re.search(r'=> \{"rationale": "So it seems.", "score": \d\}', told)
    assert "at a price that is not known" in told
