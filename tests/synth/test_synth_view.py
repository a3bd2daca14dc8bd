"""The page of a pipeline: what it shows, that nothing on it can act, and how a real browser reads it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SynthError
from posttrain.synth import Compare, Drop, OpenAISynth, Pair, Pipeline, Reply, Report, Step
from posttrain.synth.pipelines.report import cells
from posttrain.synth.pipelines.view import differences, page

EVIL = "<script>document.title = 'taken over'</script><img src=x onerror=\"document.title='taken over'\"> & more"


class Picky(Step):
    def fold(self, row: dict[str, Any], replies: list[Any]) -> list[Any]:
        return [Drop(row, "too evil", EVIL) if row.get("bad") else row]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Three pairs, one of them of hostile text, and one row dropped."""
    rows = [
        {"prompt": f"question {i} {EVIL if i == 1 else ''}", "response": text, "score": score}
        for i in range(3) for text, score in ((f"the sum is {i} {EVIL}", 2), (f"the sum was {i}", 1))
    ]  # fmt: skip
    client = OpenAISynth(api_key="sk-secret-key-123", work_dir=tmp_path)
    return Pipeline([Picky(), Pair()]).run([*rows, {"prompt": "x", "response": "y", "bad": True}], client, "t<b>")


def test_the_page_holds_pairs_scores_and_reasons(report: Report) -> None:
    made = page(report)
    assert made.count('<article class="card">') == 3 + 1
    assert "<del>was</del>" in made
    assert "too evil <b>1</b>" in made
    assert "7 rows in, 3 out" in made
    assert "how often each score occurs" in made
    for outside in ("http://", "https://", "src=x on", "<script", "sk-secret", "@import", "url("):
        assert outside not in made.replace("&lt;img src=x on", "").replace("&lt;script", "")
    assert page(Report.load(report.folder)) == made  # from the files alone, and the same each time


def test_a_long_run_is_sampled_and_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r" * 7000} for i in range(90)]
    report = Pipeline([Picky()]).run(rows, OpenAISynth(api_key="sk-secret-key-123", work_dir=tmp_path), "t")
    made = page(report)
    assert made.count('<article class="card">') == 40
    assert "40 of 90, evenly spread" in made
    assert "(1,000 characters more)" in made


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(SynthError, match=r"holds no report.json"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(SynthError, match="cannot be read"):
        Report.load(tmp_path)


def test_differences_are_words() -> None:
    assert differences("a < b, c", "a < d, c") == ("a &lt; <del>b</del>, c", "a &lt; <ins>d</ins>, c")
    assert differences("same", "same") == ("same", "same")
    assert differences("", "new") == ("", "<ins>new</ins>")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium: apt-get install chromium")
def test_a_browser_shows_it_and_runs_nothing_of_it(report: Report, tmp_path: Path) -> None:
    file, picture = tmp_path / "view.html", tmp_path / "view.png"
    file.write_text(page(report), encoding="utf-8")
    browser = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1000,1400",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    done = subprocess.run(
        [*browser, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "<title>t&lt;b&gt;</title>" in done.stdout  # no script has changed it
    assert done.stdout.count('<article class="card">') == 4
    assert done.stdout.count("<img") == done.stdout.count("<script") == 0
    subprocess.run([*browser, f"--screenshot={picture}", file.as_uri()], capture_output=True, timeout=120, check=True)
    from PIL import Image

    seen = Image.open(picture).convert("RGB")
    colours = {colour for _, colour in seen.getcolors(1 << 24) or []}
    assert seen.size == (1000, 1400)
    assert (59, 110, 168) in colours or (111, 163, 221) in colours  # the bars of the funnel
    assert (216, 240, 226) in colours or (22, 58, 40) in colours  # a marked word


def judged(number: int, model: str, score: float | None) -> dict[str, Any]:
    judgement = {"aspect": "quality", "model": "judge-1", "score": score, "rationale": f"because {model} {EVIL}"}
    judgement |= {} if score is not None else {"trouble": "the reply gives no score on the scale"}
    return {
        "prompt": f"q{number}", "response": f"{model} says {number}", "score": score or 0.5, "model": model,
        "judgements": [judgement],
    }  # fmt: skip


@pytest.fixture
def compared(tmp_path: Path) -> Report:
    """Two models, of which the first one always wins."""
    rows = [
        judged(i, model, score)
        for i in range(5)
        for model, score in (("model-a", 4.0), ("model-b", 2.0 if i else None))
    ]
    client = OpenAISynth(api_key="sk-secret-key-123", work_dir=tmp_path)
    return Pipeline([Picky(), Pair()]).run([*rows, {"prompt": "x", "response": "y", "bad": True}], client, "t")


def test_pairs_name_the_models_and_the_reasons_of_the_judges(compared: Report) -> None:
    made = page(compared)
    (row, *_) = compared.rows()
    assert (row["model_chosen"], row["model_rejected"]) == ("model-a", "model-b")
    assert "model-a · 4" in made
    assert "because model-a" in made
    assert "judge-1, quality:  (the reply gives no score on the scale)" in made
    assert "<script" not in made
    assert "<td>model-a</td><td>5</td><td>4</td><td>5</td><td>0</td>" in made
    assert "<td>model-b</td><td>5</td><td>1.7</td><td>0</td><td>5</td>" in made


def test_numbers_add_up_and_axes_carry_counts(compared: Report) -> None:
    for stage in compared.stages[1:]:
        came, new, went, dropped, *_ = (int(text.replace(",", "") or 0) for text in cells(stage))
        assert came + new == went + dropped
    assert cells(compared.stages[2])[:4] == ["10", "-5", "5", ""]
    made = page(compared)
    assert "in + new = out + dropped" in made
    assert 'text-anchor="middle">5</text>' in made  # five rows have a score of 4


def test_what_failed_is_on_the_page(compared: Report) -> None:
    compared.stages[1].trouble = f"3 requests have no result: 3 timeout {EVIL}"
    made = page(compared)
    assert "What failed" in made
    assert "3 timeout &lt;script&gt;" in made


def test_a_vote_shows_its_reasons(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "model_chosen": "x", "model_rejected": "y"}
    texts = ['{"rationale": "clearer", "winner": "B"}', '{"rationale": "clearer", "winner": "A"}']
    said = [{"choices": [{"message": {"content": text}}]} for text in texts]
    (made,) = Compare(model="judge-2").fold(row, [Reply(body) for body in said])
    assert isinstance(made, dict)
    assert (made["chosen"], made["model_chosen"], made["model_rejected"]) == ("b", "y", "x")
    client = OpenAISynth(api_key="sk-secret-key-123", work_dir=tmp_path)
    shown = page(Pipeline([Picky()]).run([made], client, "t"))
    assert "judge-2: rejected, rejected" in shown
    assert "clearer" in shown


def test_text_runs_from_right_to_left_where_it_does_and_a_phone_can_show_it(report: Report) -> None:
    made = page(report)
    assert made.count("<pre") == made.count('<pre dir="auto"') + made.count('<pre class="bad"')
    assert "max-width:760px" in made
    assert made.count('<div class="wide"><table>') == made.count("<table>")
