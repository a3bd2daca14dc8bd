"""`posttrain eval`: how many replies of a model are right, on rows of your own, and whether one model beats another.

The work is that of data generation (`generate | verify`, see posttrain/synth), with a model in this process: replies
are in a ledger before they count, so that the same command goes on after a crash, and asks nothing twice.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

from posttrain.blocks.data.sources import Source
from posttrain.blocks.models.exports import export_of
from posttrain.errors import RecipeError
from posttrain.synth.steps.answers import ID, answer, asked
from posttrain.synth.steps.verify import Verify

if TYPE_CHECKING:
    from rich.table import Table

Z = 1.959964
"""Standard errors to either side that hold 95 % of a normal distribution."""


class Interval(NamedTuple):
    """An estimate, and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%}  [{self.low:.1%}, {self.high:.1%}]"


@attrs.frozen
class Result:
    """What a model's replies were worth."""

    model: str
    scores: dict[int, float]
    """Number of a row -> 1 if the reply was right, 0 if not, or between."""
    cut: int
    """Replies that ended at `max_new_tokens`."""
    unscored: dict[str, int]
    """Rows without a score, by reason; they count as wrong in nothing."""
    folder: Path
    """With the replies: a row a line in `2-verify.jsonl`."""

    @property
    def right(self) -> Interval:
        """The mean score: Wilson's interval if every score is 0 or 1 (1927), else the normal one."""
        scores = list(self.scores.values())
        if not scores:
            return Interval(math.nan, math.nan, math.nan)
        n, mean = len(scores), sum(scores) / len(scores)
        if set(scores) <= {0.0, 1.0}:
            middle, spread = mean + Z * Z / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
            return Interval(mean, (middle - spread) / (1 + Z * Z / n), (middle + spread) / (1 + Z * Z / n))
        error = Z * math.sqrt(sum((s - mean) ** 2 for s in scores) / max(1, n - 1) / n)
        return Interval(mean, mean - error, mean + error)


@attrs.frozen
class Comparison:
    """Two models on the same rows."""

    better: int
    worse: int
    difference: Interval
    """Of the mean scores, by the differences row by row."""
    p_value: float
    """McNemar's exact test: how often chance alone would split the rows that differ at least so unevenly."""


def compare(first: Result, second: Result) -> Comparison:
    """Return by how much the second model is better than the first.

    Raises:
        RecipeError: no row was scored for both.
    """
    rows = sorted(first.scores.keys() & second.scores.keys())
    if not rows:
        raise RecipeError("the two models have no scored row in common")
    gains = [second.scores[row] - first.scores[row] for row in rows]
    mean, n = sum(gains) / len(gains), len(gains)
    error = Z * math.sqrt(sum((gain - mean) ** 2 for gain in gains) / max(1, n - 1) / n)
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1)) / 2 ** (better + worse)
    return Comparison(better, worse, Interval(mean, mean - error, mean + error), min(1.0, 2 * tail))


def evaluate(
    model: str, data: Path, check: str | Callable[..., bool | float] = "exact", *, wanted: str | None = None,
    rows: int | None = None, max_new_tokens: int = 256, system: str | None = None, batch_size: int = 32,
    output_dir: Path | None = None, device: str = "auto",
) -> Result:  # fmt: skip
    """Have a model answer the rows of a file, and check its replies. Greedy: the likeliest token each time.

    Args:
        model: folder of a run, of a model or an adapter, or a hub name.
        data: rows as any source of chats has them; the last reply is the right answer.
        check: a verifier by name (`exact`, `number`, `math`, `code`, `json_schema`, or of your own), or a function of
            the answer and the row.
        wanted: another column that holds the right answer, the tests or the schema.
        rows: only the first so many.
        max_new_tokens: of each reply.
        system: said before each prompt.
        batch_size: prompts that are answered together.
        output_dir: where the replies go; by default `evals` in the run's folder, or here.
        device: `cpu`, `cuda`, `mps`, or what there is.

    Raises:
        RecipeError: the model, the file or the check is not what it should be.
        SynthError: the ledger cannot be written.
    """
    from posttrain.synth.clients.transformers import TransformersSynth

    place = export_of(model)
    checks = Verify(function=check, wanted=wanted)
    for _, problem in checks.check():
        raise RecipeError(f"--check: {problem}")
    work = output_dir or (Path(model) if place != model else Path()) / "evals"
    if output_dir is not None or place == model:  # several models share it
        work = work / _file_name(model)
    client = TransformersSynth(work_dir=work, name_or_path=place, batch_size=batch_size, device=device)  # type: ignore[call-arg]
    called = check if isinstance(check, str) else check.__name__
    questions = list(asked(Source(name_or_path=str(data)), rows, system, wanted))
    report = answer(questions, client, checks, max_new_tokens, f"{data.stem}-{called}")
    scored = list(report.rows())
    result = Result(
        model, {row[ID]: float(row["score"]) for row in scored},
        sum(row["finish_reason"] == "length" for row in scored),
        {reason: count for stage in report.stages for reason, count in stage.dropped.items()}, report.folder,
    )  # fmt: skip
    _write(result, data, called)
    return result


def table(results: list[Result]) -> "Table":
    """Return results for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("model", overflow="fold")
    for name in ("right, 95 % interval", "rows", "cut"):
        made.add_column(name, justify="right")
    for result in results:
        made.add_row(Text(result.model), str(result.right), f"{len(result.scores):,}", f"{result.cut:,}")
    return made


def sentences(results: list[Result]) -> Iterator[str]:
    """Yield what else there is to say, a line each."""
    for result in results:
        if result.unscored:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in result.unscored.items())
            yield f"{result.model}: rows without a score: {reasons}"
        if result.cut:
            yield f"{result.model}: {result.cut:,} replies were cut at --max-new-tokens"
    for second in results[1:]:
        found = compare(results[0], second)
        value, low, high = (100 * number for number in found.difference)
        yield (
            f"{second.model} against {results[0].model}, row by row: {value:+.1f} points [{low:+.1f}, {high:+.1f}], "
            f"{found.better:,} rows better, {found.worse:,} worse, p = {found.p_value:.2g}"
        )
    for result in results:
        yield f"replies: posttrain synth view {result.folder}"


def summaries(run: Path) -> list[dict[str, Any]]:
    """Return what each evaluation of a run has come to, as it was written."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(run.glob("evals/*/summary.json"))]


def _write(result: Result, data: Path, check: str) -> None:
    """Write the summary beside the replies."""
    value, low, high = result.right
    said = {
        "model": result.model, "data": str(data), "check": check, "rows": len(result.scores), "right": value,
        "interval_95": [low, high], "cut": result.cut, "unscored": result.unscored,
    }  # fmt: skip
    (result.folder / "summary.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _file_name(model: str) -> str:
    """Return a name of a folder for a model."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.")[-100:] or "model"
