"""The page of a pipeline: what it shows, that nothing on it can act, and how a real browser reads it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SynthError
from posttrain.synth import Drop, OpenAISynth, Pair, Pipeline, Report, Step
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
