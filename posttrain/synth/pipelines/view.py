"""One page to look at a pipeline: the funnel, scores, pairs with their differences marked, rows, and what was dropped.

The page is one file of HTML: no server, no script, nothing from elsewhere. What models and data said is escaped, and
a policy in the page forbids everything but its own style.
"""

import json
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.synth.pipelines.pictures import differences, document, funnel, histogram, scatter, section, table
from posttrain.synth.pipelines.report import CELLS, Report, Stage, cells, dollars, plain
from posttrain.synth.pipelines.rows import Row, answered, as_text, transcript

SHOWN = 40
"""Rows on the page; a larger run is sampled evenly."""
MODELS_NOTE = "Scores of all their answers, and how often an answer of theirs was the better or the worse one of a pair"
MAP_NOTE = "Where rows are by what they mean: near each other, alike; pale, what was dropped. Holes are what is missing"
DOTS = 1500
"""On the map, of those that stayed and of those that went."""
SHOWN_DROPPED = 3
"""Rows per reason."""
COUNTED = 20_000
"""Rows that the picture of the scores is made of, at most."""
LONGEST = 6_000
"""Characters of a text on the page."""


def page(report: Report) -> str:
    """Return the page of a report as HTML."""
    parts = [
        f"<h1>{escape(report.task)}</h1>", f'<p class="note">{_summary(report)}</p>',
        section("From rows to data", funnel(report) + _table(report) + _facts(report)),
        section("What failed", _troubles(report)), section("Models", models(report), MODELS_NOTE),
        section("Coverage", _coverage(report), MAP_NOTE), *_last(report), *_dropped(report),
    ]  # fmt: skip
    return document(report.task, parts)


# -- sections -------------------------------------------------------------------------


def _summary(report: Report) -> str:
    first, last = report.stages[0], report.stages[-1]
    requests = sum(stage.requests for stage in report.stages)
    tokens = sum(stage.input_tokens + stage.output_tokens for stage in report.stages)
    said = f"{first.rows_out:,} rows in, {last.rows_out:,} out; {requests:,} requests, {tokens:,} tokens"
    said += f", cost {dollars(report.cost)}" if requests else ""
    if report.failed:
        said += f'; <span class="bad">{report.failed:,} requests failed</span>'
    if report.unfinished:
        said += f'. <span class="bad">Not finished: {escape(report.unfinished)}</span>'
    return said


def _table(report: Report) -> str:
    names = ("step", *CELLS)
    rows = []
    for stage in report.stages:
        found = [f"{stage.number} {stage.name}", *cells(stage)]
        rows.append(found + [""] * (len(names) - len(found)))
    return table(names, rows) + '<p class="note">in + new = out + dropped</p>'


def _troubles(report: Report) -> str:
    found = ((stage.name, stage.trouble) for stage in report.stages if stage.trouble)
    return "".join(f'<p class="label">{escape(name)}</p><pre class="bad">{escape(text)}</pre>' for name, text in found)


def models(report: Report) -> str:
    """Return what each model came to, where several answered: answers, mean score, places in pairs."""
    scores: dict[str, list[float]] = {}
    chosen, rejected = Counter[str](), Counter[str]()
    scored = [stage for stage in report.stages if any(_scores(report, stage, 1))][-1:]
    for row, _ in _sample(report.folder / scored[0].file, scored[0].rows_out, COUNTED) if scored else ():
        if row.get("model") and isinstance(row.get("score"), int | float):
            scores.setdefault(as_text(row["model"]), []).append(float(row["score"]))
    last = report.stages[-1]
    for row, _ in _sample(report.folder / last.file, last.rows_out, COUNTED):
        chosen.update([as_text(row["model_chosen"])] if row.get("model_chosen") else [])
        rejected.update([as_text(row["model_rejected"])] if row.get("model_rejected") else [])
    names = sorted({*scores, *chosen, *rejected})
    if len(names) < 2:
        return ""
    lines = []
    for name in names:
        found = scores.get(name, [])
        mean = f"{sum(found) / len(found):.3g}" if found else ""
        lines.append((name, f"{len(found):,}" if found else "", mean, f"{chosen[name]:,}", f"{rejected[name]:,}"))
    return table(("model", "scored", "mean score", "chosen", "rejected"), lines)


def _coverage(report: Report) -> str:
    """Return the map of the last step that has placed rows."""
    for stage in reversed(report.stages):
        kept = _places(report.folder / stage.file, stage.rows_out)
        if stage.name == "semantic" and kept:
            lost = _places(report.folder / stage.dropped_file, sum(stage.dropped.values()))
            return scatter(kept, lost, "where rows are by what they mean")
    return ""


def _places(file: Path, total: int) -> list[list[float]]:
    return [row["place"] for row, _ in _sample(file, total, DOTS) if isinstance(row.get("place"), list)]


def _facts(report: Report) -> str:
    found = [
        f"<li>{escape(stage.name)}: {escape(name)} <b>{escape(plain(value))}</b></li>"
        for stage in report.stages for name, value in stage.facts.items()
    ]  # fmt: skip
    return f"<ul>{''.join(found)}</ul>" if found else ""


def _last(report: Report) -> Iterator[str]:
    """Yield the scores of the last step that has any, and what came out of the last one."""
    scored = [(stage, values) for stage in report.stages if (values := _scores(report, stage))]
    if scored:
        stage, values = scored[-1]
        note = f"After step {stage.number}, {stage.name}"
        sampled = len(values) < stage.rows_out
        note += f"; {len(values):,} of {stage.rows_out:,} rows" + (", evenly spread" if sampled else "")
        note += ". Upright: how many rows; across: the score"
        yield section("Scores", histogram(values, "how often each score occurs"), note)
    last = report.stages[-1]
    rows = [row for row, _ in _sample(report.folder / last.file, last.rows_out, SHOWN)]
    note = f"{len(rows):,} of {last.rows_out:,}, evenly spread" if len(rows) < last.rows_out else f"All {len(rows):,}"
    if rows and all("chosen" in row and "rejected" in row for row in rows):
        yield section("Pairs", "".join(map(_pair, rows)), f"{note}. Marked: words that only one of the two has.")
    else:
        yield section("Rows", "".join(map(_row, rows)), note)


def _dropped(report: Report) -> Iterator[str]:
    """Yield what each step dropped, by reason."""
    found = ""
    for stage in report.stages:
        total = sum(stage.dropped.values())
        if not total:
            continue
        shown: dict[str, list[Row]] = {}
        for row, _ in _sample(report.folder / stage.dropped_file, total, COUNTED):
            examples = shown.setdefault(row["dropped"]["reason"], [])
            if len(examples) < SHOWN_DROPPED:
                examples.append(row)
        for reason, count in stage.dropped.items():
            inside = "".join(_row(row, row["dropped"]["detail"]) for row in shown.get(reason, []))
            head = f"{escape(stage.name)}: {escape(reason)} <b>{count:,}</b>"
            found += f"<details><summary>{head}</summary>{inside}</details>"
    yield section(
        "Dropped", found, f"Up to {SHOWN_DROPPED} rows of each reason; `posttrain synth export --dropped` has all."
    )


def _pair(row: Row) -> str:
    rejected, chosen = differences(_short(as_text(row["rejected"])), _short(as_text(row["chosen"])))
    sides = "".join(
        f'<div><span class="label {tone}">{name}</span><span class="score">{_who(row, name)}</span>'
        f'<pre dir="auto">{text}</pre>{_judgements(row.get(f"judgements_{name}"))}</div>'
        for name, tone, text in (("chosen", "good", chosen), ("rejected", "bad", rejected))
    )
    return f'<article class="card">{_prompt(row)}<div class="two">{sides}</div>{_votes(row)}</article>'


def _who(row: Row, side: str) -> str:
    """Return whose answer it is, and its score."""
    known = (as_text(row.get(f"model_{side}") or ""), _number(row.get(f"score_{side}")))
    return escape(" · ".join(part for part in known if part))


def _judgements(given: Any) -> str:
    """Return who gave which score, and why."""
    made = ""
    for judgement in given or []:
        said = f"{judgement.get('model') or 'judge'}, {judgement.get('aspect')}: {_number(judgement.get('score'))}"
        said += f" ({judgement['trouble']})" if judgement.get("trouble") else ""
        made += _folded(said, as_text(judgement.get("rationale") or ""))
    return made


def _votes(row: Row) -> str:
    """Return whom each judge of a pair named, in each order, and why."""
    made = ""
    for vote in row.get("votes") or []:
        said = f"{vote.get('model') or 'judge'}: {', '.join(str(w or 'unreadable') for w in vote.get('winners') or [])}"
        made += _folded(said, "\n\n".join(as_text(why) for why in vote.get("rationales") or [] if why))
    return made


def _folded(said: str, inside: str) -> str:
    return f'<details><summary>{escape(said)}</summary><pre dir="auto">{escape(_short(inside))}</pre></details>'


def _row(row: Row, detail: str = "") -> str:
    problem = f'<p class="bad">{escape(_short(detail))}</p>' if detail else ""
    try:
        _, answer = answered(row)
        who = escape(f"answer · {as_text(row['model'])}" if row.get("model") else "answer")
        score = f'<span class="score">{_number(row.get("score"))}</span>'
        body = f'{_prompt(row)}<span class="label">{who}</span>{score}'
        body += f'<pre dir="auto">{escape(_short(answer))}</pre>'
    except DataError:  # no conversation (yet): as it is
        plain_row = {name: value for name, value in row.items() if name != "dropped"}
        body = f'<pre dir="auto">{escape(_short(json.dumps(plain_row, ensure_ascii=False, indent=1)))}</pre>'
    body += _folded("reasoning", as_text(row["reasoning"])) if row.get("reasoning") else ""
    body += _judgements(row.get("judgements")) + _votes(row)
    return f'<article class="card">{problem}{body}</article>'


def _prompt(row: Row) -> str:
    said = row.get("prompt")
    text = transcript(said) if isinstance(said, list) else as_text(said or "")
    return (
        f'<div class="prompt"><span class="label">prompt</span><pre dir="auto">{escape(_short(text))}</pre></div>'
        if text
        else ""
    )


# -- helpers --------------------------------------------------------------------------


def _sample(file: Path, total: int, count: int) -> Iterator[tuple[Row, int]]:
    """Yield up to `count` rows of a file with their numbers, evenly spread."""
    if not file.exists():
        return
    step = max(1.0, total / count)
    wanted = {int(i * step) for i in range(min(count, total))}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number in wanted:
                yield json.loads(line), number


def _scores(report: Report, stage: Stage, count: int = COUNTED) -> list[float]:
    found = (row.get("score") for row, _ in _sample(report.folder / stage.file, stage.rows_out, count))
    return [float(score) for score in found if isinstance(score, int | float) and not isinstance(score, bool)]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} characters more)"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""
