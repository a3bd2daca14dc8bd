"""One page to look at a pipeline: the funnel, scores, pairs with their differences marked, rows, and what was dropped.

The page is one file of HTML: no server, no script, nothing from elsewhere. What models and data said is escaped, and
a policy in the page forbids everything but its own style.
"""

import difflib
import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.synth.pipelines.report import Report, Stage, cells, dollars, plain
from posttrain.synth.pipelines.rows import Row, answered, as_text, transcript

SHOWN = 40
"""Rows on the page; a larger run is sampled evenly."""
SHOWN_DROPPED = 3
"""Rows per reason."""
COUNTED = 20_000
"""Rows that the picture of the scores is made of, at most."""
LONGEST = 6_000
"""Characters of a text on the page."""
WIDTH = 680

STYLE = """
:root { --paper:#fbfaf7; --ink:#1d1d1b; --soft:#6b6a66; --line:#dfdcd3; --card:#ffffff; --good:#157a4a; --bad:#b3372f;
  --bar:#3b6ea8; --goodwash:#d8f0e2; --badwash:#f8dedb; }
@media (prefers-color-scheme: dark) { :root { --paper:#161715; --ink:#e8e6df; --soft:#9c9a92; --line:#33342f;
  --card:#1f201d; --good:#5cc98f; --bad:#ef8d84; --bar:#6fa3dd; --goodwash:#163a28; --badwash:#47211e; } }
* { box-sizing:border-box } html { color-scheme:light dark }
body { margin:0 auto; max-width:1080px; padding:40px 24px 96px; background:var(--paper); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif }
h1 { font-size:28px; margin:0 0 4px; letter-spacing:-.01em } h2 { font-size:19px; margin:48px 0 12px }
p.note { color:var(--soft); margin:0 0 16px } table { border-collapse:collapse; width:100% }
th, td { text-align:right; padding:6px 10px; border-bottom:1px solid var(--line); font-variant-numeric:tabular-nums }
th { color:var(--soft); font-weight:500 } th:first-child, td:first-child { text-align:left; padding-left:0 }
svg { display:block; max-width:100%; height:auto; margin:0 0 18px }
svg text { fill:var(--ink); font:13px system-ui,sans-serif }
svg .soft { fill:var(--soft) } svg .kept { fill:var(--bar) } svg .lost { fill:var(--bad); opacity:.55 }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px 18px; margin:0 0 14px }
.two { display:grid; grid-template-columns:1fr 1fr; gap:18px }
@media (max-width:760px) { .two { grid-template-columns:1fr } }
pre { white-space:pre-wrap; overflow-wrap:anywhere; margin:4px 0 0;
  font:14px/1.55 ui-monospace,Menlo,Consolas,monospace }
.label { color:var(--soft); font-size:12px; text-transform:uppercase; letter-spacing:.06em }
.score { float:right; font-variant-numeric:tabular-nums; color:var(--soft) }
ins { background:var(--goodwash); color:var(--good); text-decoration:none; border-radius:3px; padding:0 1px }
del { background:var(--badwash); color:var(--bad); text-decoration:none; border-radius:3px; padding:0 1px }
.prompt { margin:0 0 12px; padding:0 0 12px; border-bottom:1px dashed var(--line) }
details { margin:8px 0 } summary { cursor:pointer; color:var(--soft) }
.bad { color:var(--bad) } .good { color:var(--good) }
"""


def page(report: Report) -> str:
    """Return the page of a report as HTML."""
    title = escape(report.task)
    parts = [
        f"<h1>{title}</h1>", f'<p class="note">{_summary(report)}</p>',
        _section("From rows to data", funnel(report) + _table(report) + _facts(report)),
        *_last(report), *_dropped(report),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def funnel(report: Report) -> str:
    """Return a picture of how many rows each step passed on (solid) and dropped (pale), to one scale."""
    most = max((stage.rows_out + sum(stage.dropped.values()) for stage in report.stages), default=0) or 1
    unit, lines = (WIDTH - 300) / most, []
    for number, stage in enumerate(report.stages):
        y, kept, lost = 34 * number, stage.rows_out, sum(stage.dropped.values())
        width, pale = kept * unit, lost * unit
        said = f"{kept:,}" + (f" · {lost:,} dropped" if lost else "")
        lines.append(
            f'<text x="0" y="{y + 19}">{escape(stage.name)}</text>'
            f'<rect class="kept" x="130" y="{y + 4}" width="{max(width, 1.5 if kept else 0):.1f}" height="22" rx="3"/>'
            f'<rect class="lost" x="{130 + width:.1f}" y="{y + 4}" width="{pale:.1f}" height="22" rx="3"/>'
            f'<text class="soft" x="{138 + width + pale:.1f}" y="{y + 19}">{said}</text>'
        )
    height = 34 * len(report.stages)
    return (
        f'<svg role="img" aria-label="rows passed on and dropped by each step" width="{WIDTH}" '
        f'viewBox="0 0 {WIDTH} {height}">{"".join(lines)}</svg>'
    )


def histogram(values: list[float], label: str) -> str:
    """Return a picture of how often values occur."""
    low, high = min(values), max(values)
    count = min(20, max(1, len(set(values))))
    width = (high - low) / count or 1.0
    bins = [0] * count
    for value in values:
        bins[min(count - 1, int((value - low) / width))] += 1
    unit, step = 110 / max(bins), min(60.0, (WIDTH - 20) / count)
    bars = "".join(
        f'<rect class="kept" x="{i * step + 1:.1f}" y="{120 - n * unit:.1f}" width="{step - 2:.1f}" '
        f'height="{n * unit:.1f}" rx="2"><title>from {low + i * width:.3g} on: {n:,}</title></rect>'
        for i, n in enumerate(bins)
    )
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{WIDTH}" viewBox="0 0 {WIDTH} 145">{bars}'
        f'<text class="soft" x="0" y="140">{low:.3g}</text>'
        f'<text class="soft" x="{count * step:.0f}" y="140" text-anchor="end">{high:.3g}</text></svg>'
    )


def differences(old: str, new: str) -> tuple[str, str]:
    """Return both texts as HTML, with the words that only one of them has marked: `<del>` and `<ins>`.

    >>> differences("the sum is 3", "the sum is 4")
    ('the sum is <del>3</del>', 'the sum is <ins>4</ins>')
    """
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (old, new))
    ours, theirs = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=len(a) > 2000).get_opcodes():
        was, now = escape("".join(a[i:j])), escape("".join(b[k:m]))
        ours.append(was if kind == "equal" or not was else f"<del>{was}</del>")
        theirs.append(now if kind == "equal" or not now else f"<ins>{now}</ins>")
    return "".join(ours), "".join(theirs)


# -- sections -------------------------------------------------------------------------


def _section(title: str, content: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>" if content else ""


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
    names = ("step", "in", "out", "dropped", "requests", "failed", "tokens", "cost")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = ""
    for stage in report.stages:
        found = [f"{stage.number} {stage.name}", *cells(stage)]
        found += [""] * (len(names) - len(found))
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in found) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


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
        note += f"; every {len(values):,} of {stage.rows_out:,} rows" if len(values) < stage.rows_out else ""
        yield _section("Scores", histogram(values, "how often each score occurs"), note)
    last = report.stages[-1]
    rows = [row for row, _ in _sample(report.folder / last.file, last.rows_out, SHOWN)]
    note = f"{len(rows):,} of {last.rows_out:,}, evenly spread" if len(rows) < last.rows_out else f"All {len(rows):,}"
    if rows and all("chosen" in row and "rejected" in row for row in rows):
        yield _section("Pairs", "".join(map(_pair, rows)), f"{note}. Marked: words that only one of the two has.")
    else:
        yield _section("Rows", "".join(map(_row, rows)), note)


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
    yield _section(
        "Dropped", found, f"Up to {SHOWN_DROPPED} rows of each reason; `posttrain synth export --dropped` has all."
    )


def _pair(row: Row) -> str:
    rejected, chosen = differences(_short(as_text(row["rejected"])), _short(as_text(row["chosen"])))
    sides = "".join(
        f'<div><span class="label {tone}">{name}</span><span class="score">{_number(row.get(f"score_{name}"))}</span>'
        f"<pre>{text}</pre></div>"
        for name, tone, text in (("chosen", "good", chosen), ("rejected", "bad", rejected))
    )
    return f'<article class="card">{_prompt(row)}<div class="two">{sides}</div></article>'


def _row(row: Row, detail: str = "") -> str:
    problem = f'<p class="bad">{escape(_short(detail))}</p>' if detail else ""
    try:
        _, answer = answered(row)
        body = f'<span class="label">answer</span><span class="score">{_number(row.get("score"))}</span>'
        body = _prompt(row) + body + f"<pre>{escape(_short(answer))}</pre>"
    except DataError:  # no conversation (yet): as it is
        plain_row = {name: value for name, value in row.items() if name != "dropped"}
        body = f"<pre>{escape(_short(json.dumps(plain_row, ensure_ascii=False, indent=1)))}</pre>"
    for judgement in row.get("judgements") or []:
        said = f"{judgement.get('model') or 'judge'}, {judgement.get('aspect')}: {_number(judgement.get('score'))}"
        why = escape(_short(as_text(judgement.get("rationale"))))
        body += f"<details><summary>{escape(said)}</summary><pre>{why}</pre></details>"
    return f'<article class="card">{problem}{body}</article>'


def _prompt(row: Row) -> str:
    said = row.get("prompt")
    text = transcript(said) if isinstance(said, list) else as_text(said or "")
    return (
        f'<div class="prompt"><span class="label">prompt</span><pre>{escape(_short(text))}</pre></div>' if text else ""
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


def _scores(report: Report, stage: Stage) -> list[float]:
    found = (row.get("score") for row, _ in _sample(report.folder / stage.file, stage.rows_out, COUNTED))
    return [float(score) for score in found if isinstance(score, int | float) and not isinstance(score, bool)]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} characters more)"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""
