"""What the pages that `view` makes are put together from: a page without scripts, sections, tables, pictures, texts."""

import difflib
import re
from collections.abc import Iterable, Sequence
from html import escape

from posttrain.synth.pipelines.report import Report

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
.wide { overflow-x:auto }
svg { display:block; max-width:100%; height:auto; margin:0 0 18px }
svg text { fill:var(--ink); font:13px system-ui,sans-serif }
svg .soft { fill:var(--soft) } svg .kept { fill:var(--bar) } svg .lost { fill:var(--bad); opacity:.55 }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px 18px; margin:0 0 14px }
.two { display:grid; grid-template-columns:1fr 1fr; gap:18px }
@media (max-width:760px) { .two { grid-template-columns:1fr } body { padding:20px 12px 64px; overflow-wrap:anywhere }
  th, td { padding:6px 6px; white-space:nowrap } h1 { font-size:22px } .card { padding:12px } }
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


def document(title: str, parts: Iterable[str], style: str = STYLE, again: int = 0) -> str:
    """Return a page of HTML that loads nothing and runs nothing: a policy in it forbids all but its own style. A
    browser reads it again after so many seconds, if that is above 0."""
    reload = f'<meta http-equiv="refresh" content="{again}">' if again else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{reload}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def section(title: str, content: str, note: str = "") -> str:
    """Return a part of a page under a heading; nothing if there is nothing in it."""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>" if content else ""


def table(head: Iterable[str], rows: Sequence[Iterable[str]]) -> str:
    """Return a table; nothing if it has no rows."""
    if not rows:
        return ""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


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
        + (
            f'<text class="soft" x="{(i + 0.5) * step:.1f}" y="{115 - n * unit:.1f}" text-anchor="middle">{n:,}</text>'
            if n
            else ""
        )
        for i, n in enumerate(bins)
    )
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{WIDTH}" viewBox="0 -12 {WIDTH} 157">{bars}'
        f'<text class="soft" x="0" y="140">{low:.3g}</text>'
        f'<text class="soft" x="{count * step:.0f}" y="140" text-anchor="end">{high:.3g}</text></svg>'
    )


def scatter(kept: Sequence[Sequence[float]], lost: Sequence[Sequence[float]], label: str) -> str:
    """Return a picture of places in two dimensions, to one scale: those that stayed (solid) and those that went."""
    found = [*kept, *lost]
    low = [min(place[axis] for place in found) for axis in (0, 1)]
    reach = max(max(place[axis] for place in found) - low[axis] for axis in (0, 1)) or 1.0
    unit = (WIDTH - 20) / reach

    def dots(places: Sequence[Sequence[float]], kind: str) -> str:
        return "".join(
            f'<circle class="{kind}" cx="{10 + (x - low[0]) * unit:.1f}" cy="{10 + (y - low[1]) * unit:.1f}" r="3"/>'
            for x, y in places
        )

    height = 20 + (max(place[1] for place in found) - low[1]) * unit
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{WIDTH}" viewBox="0 0 {WIDTH} {height:.0f}">'
        f"{dots(lost, 'lost')}{dots(kept, 'kept')}</svg>"
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
