"""`posttrain view`: one page to look at a training run: curves, samples, rows and masks, rollouts, recipe, versions.

The page is one file of HTML: no server, no script, nothing from elsewhere. What models and data said is escaped, and a
policy in the page forbids everything but its own style.
"""

import json
import math
from collections.abc import Iterator
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain import yaml12
from posttrain.blocks.rollouts.ledger import read
from posttrain.errors import DataError, PosttrainError, RecipeError
from posttrain.runtime.folder import recipe_of
from posttrain.synth.pipelines.pictures import STYLE, WIDTH, document, section, table
from posttrain.tools.afterwards.evaluate import summaries
from posttrain.tools.plot import smooth
from posttrain.words import duration, human

HEIGHT = 150
NOISY = 60
"""Points from which on a curve is drawn smoothed, over a pale one of all of them."""
POINTS = 400
"""Of a curve; more than the page has pixels for."""
FIRST = ("loss", "eval_loss", "reward", "lr", "grad_norm", "tokens_per_second")
"""Curves that come first."""
HIDDEN = ("step", "time", "epoch", "tokens", "supervised_tokens", "memory_gb")
SHOWN = 3
"""Rows of data whose masks are shown."""
GROUPS = 4
"""Of rollouts: the first ones and the last ones."""
LONGEST = 4_000
"""Characters of a text on the page."""
MORE = """
.curves { display:grid; grid-template-columns:1fr 1fr; gap:18px } figure { margin:0 }
@media (max-width:760px) { .curves { grid-template-columns:1fr } }
svg .line { fill:none; stroke:var(--bar); stroke-width:1.6 } svg .raw { fill:none; stroke:var(--bar); opacity:.25 }
svg .axis { stroke:var(--line) } mark { background:var(--goodwash); color:inherit; border-radius:2px }
.masked { color:var(--soft) }
"""


def write(run: Path, target: Path, step: int | None = None) -> None:
    """Write the page of a run (see `page`)."""
    target.write_text(page(run, step), encoding="utf-8")


def page(run: Path, step: int | None = None) -> str:
    """Return the page of a run as HTML.

    Args:
        run: its folder.
        step: of a policy, show all that it said in this step, instead of the first groups of replies and the last ones.

    Raises:
        RecipeError: the folder holds no run, or nothing was said in that step.
    """
    recipe = recipe_of(run)
    lines = list(_lines(run / "metrics.jsonl"))
    title = run.absolute().name
    parts = [
        f"<h1>{escape(title)}</h1>", f'<p class="note">{_summary(recipe, lines)}</p>', _failure(run),
        section("Curves", curves(lines), "Across: the optimizer step. Pale: each step; full: smoothed"),
        section("Right answers", _evals(run), "By posttrain eval, with 95 % intervals"),
        section("What it said", _samples(run), "By the callback samples: the same prompts at different steps"),
        section("Rollouts", _rollouts(run, step), f"Step {step}" if step else "The first groups and the last ones"),
        section("Data", _data(run) + _masks(run), "What became of the rows, and the first of them. Marked: trained"),
        section("Recipe", f'<pre class="card">{escape(_recipe(recipe))}</pre>'),
        section("Versions", _versions(run)),
    ]  # fmt: skip
    return document(title, parts, STYLE + MORE)


# -- sections -------------------------------------------------------------------------


def _summary(recipe: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    said = [str(recipe["type"]), str(recipe["model"].get("name_or_path", recipe["model"].get("type")))]
    if lines:
        last = lines[-1]
        tokens = sum(line.get("tokens") or 0 for line in lines)
        pace = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        most = f" of {recipe['max_steps']:,}" if recipe.get("max_steps") else ""
        said.append(f"{int(last['step']):,} steps{most}")
        said.append(f"{human(tokens)} tokens")
        if pace:
            said.append(f"{human(sum(pace) / len(pace))} tokens per second")
        said.append(duration(last["time"] - lines[0]["time"]))
    return " · ".join(map(escape, said))


def _failure(run: Path) -> str:
    file = run / "failure.txt"
    if not file.exists():
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")[-LONGEST:]
    return f'<details><summary class="bad">A process failed: failure.txt</summary><pre>{escape(text)}</pre></details>'


def curves(lines: list[dict[str, Any]]) -> str:
    """Return a picture for each metric."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in HIDDEN and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((float(line["step"]), float(value)))
    names = [*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST)]
    return f'<div class="curves">{"".join(_curve(name, found[name]) for name in names)}</div>' if names else ""


def _curve(name: str, points: list[tuple[float, float]]) -> str:
    """Return one curve as a picture; smoothed where it has many points, each with noise."""
    points = points[:: max(1, len(points) // POINTS)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    first, last = points[0][0], points[-1][0]
    left, right, bottom = 66, WIDTH // 2 - 10, HEIGHT - 24
    across, upright = (right - left) / ((last - first) or 1), (bottom - 10) / ((high - low) or 1)

    def path(values: list[tuple[float, float]]) -> str:
        return " ".join(f"{left + (x - first) * across:.1f},{bottom - (y - low) * upright:.1f}" for x, y in values)

    noisy = len(points) > NOISY and not name.startswith(("lr", "eval_"))
    drawn = f'<polyline class="raw" points="{path(points)}"/>' if noisy else ""
    drawn += f'<polyline class="line" points="{path(list(zip(xs, smooth(ys), strict=True)) if noisy else points)}"/>'
    if len(points) == 1:
        drawn = f'<circle class="kept" cx="{left}" cy="{bottom}" r="3"/>'
    texts = [
        (left - 6, 16, "end", f"{high:.2g}"), (left - 6, bottom, "end", f"{low:.2g}"),
        (left, HEIGHT - 6, "start", f"{first:.0f}"), (right, HEIGHT - 6, "end", f"{last:.0f}"),
    ]  # fmt: skip
    said = (f'<text class="soft" x="{x}" y="{y}" text-anchor="{side}">{text}</text>' for x, y, side, text in texts)
    return (
        f'<figure class="card"><span class="score">{points[-1][1]:.4g}</span><div class="label">{escape(name)}</div>'
        f'<svg role="img" aria-label="{escape(name)} by step" width="100%" viewBox="0 0 {WIDTH // 2} {HEIGHT}">'
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>{drawn}{"".join(said)}</svg>'
        "</figure>"
    )


def _evals(run: Path) -> str:
    rows = []
    for said in summaries(run):
        low, high = said["interval_95"]
        cells = (
            f"{said['data']} ({said['check']})",
            f"{said['right']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{said['rows']:,}",
        )
        rows.append(cells)
    return table(("data", "right", "95 %", "rows"), rows)


def _samples(run: Path) -> str:
    told: dict[str, list[str]] = {}
    for line in _lines(run / "samples.jsonl"):
        said = f'<p class="label">step {int(line["step"]):,}</p><pre>{escape(str(line["reply"])[:LONGEST])}</pre>'
        told.setdefault(str(line["prompt"]), []).append(said)
    return "".join(
        f'<div class="card"><pre class="prompt">{escape(prompt[:LONGEST])}</pre>{"".join(said)}</div>'
        for prompt, said in told.items()
    )


def _rollouts(run: Path, step: int | None) -> str:
    lines = list(read(run))
    shown = lines if len(lines) <= 2 * GROUPS else [*lines[:GROUPS], *lines[-GROUPS:]]
    if step is not None:
        shown = [line for line in lines if line["step"] == step]
        if not shown:
            said = f"steps {lines[0]['step']} to {lines[-1]['step']}" if lines else "no rollouts"
            raise RecipeError(f"nothing was said in step {step}: {run} holds {said}")
    return "".join(
        f'<div class="card"><p class="label">step {int(line["step"]):,}</p><pre class="prompt">'
        f"{escape(str(line['text'])[:LONGEST])}</pre>{_images(line)}"
        f"<details><summary>{len(line['replies']):,} replies</summary>"
        f"{''.join(map(_reply, line['replies']))}</details></div>"
        for line in shown
    )


def _images(line: dict[str, Any]) -> str:
    """Return which images a prompt shows; their pixels are not kept."""
    named = (
        f"image {'x'.join(map(str, one['size']))}: {one.get('path') or one.get('url') or 'in the row, ' + one['hash']}"
        for one in line.get("images", ())
    )
    return "".join(f'<p class="label">{escape(name)}</p>' for name in named)


def _reply(reply: dict[str, Any]) -> str:
    parts = {**reply["rewards"], **reply["failed"]}
    more = "".join(f", {name} {_number(value)}" for name, value in parts.items()) if len(parts) > 1 else ""
    said = f"reward {_number(reply['reward'])}, advantage {_number(reply['advantage'])}{more}"
    turns = reply.get("messages") or [{"content": reply["text"]}]
    texts = (f"[{one['role']}] {_words(one)}" if len(turns) > 1 else reply["text"] for one in turns)
    return f'<p class="label">{escape(said)}</p>' + "".join(f"<pre>{escape(text[:LONGEST])}</pre>" for text in texts)


def _words(message: dict[str, Any]) -> str:
    """Return what a message of a conversation says, with the tools that it calls."""
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or [])
    return "\n".join([str(message.get("content") or ""), *calls]).strip()


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _data(run: Path) -> str:
    file = run / "ledger.json"
    sources = json.loads(file.read_text(encoding="utf-8")).get("sources", {}) if file.exists() else {}
    names = [name for name in ("rows_in", "documents", "pairs", "tokens", "supervised_tokens")
             if any(source.get(name) for source in sources.values())]  # fmt: skip
    rows = [(source, *(f"{said.get(name, 0):,}" for name in names), _dropped(said)) for source, said in sources.items()]
    return table(("source", *(name.replace("_", " ") for name in names), "dropped"), rows)


def _dropped(said: dict[str, Any]) -> str:
    found = said.get("dropped") or {}
    return "; ".join(f"{n['count'] if isinstance(n, dict) else n:,} {why}" for why, n in found.items()) or "none"


def _masks(run: Path) -> str:
    """Return the first rows with what is trained marked; or why they cannot be shown any more."""
    from posttrain.recipes.load import load

    try:
        trainer = load(run / "recipe.yaml")
        data: Any = trainer.data
        shown = list(islice(data.preview(trainer.tokenizer.build(trainer.model), SHOWN), SHOWN))
    except (PosttrainError, DataError, AttributeError, OSError) as error:
        return f'<p class="note">The rows cannot be shown: {escape(str(error).splitlines()[0])}</p>'
    return "".join(
        f'<div class="card"><p class="label">{escape(one.source)}</p><pre>{_marked(one.tokens)}</pre></div>'
        for one in shown
    )


def _marked(tokens: list[Any]) -> str:
    made = []
    for text, trained, _ in tokens:
        made.append(f"<mark>{escape(text)}</mark>" if trained else f'<span class="masked">{escape(text)}</span>')
    return "".join(made).replace("</mark><mark>", "").replace('</span><span class="masked">', "")


def _recipe(recipe: dict[str, Any]) -> str:
    """Return a recipe as YAML, without what says nothing."""

    def said(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: said(inner) for key, inner in value.items() if inner not in (None, {}, [])}
        return [said(inner) for inner in value] if isinstance(value, list) else value

    return yaml12.write(said(recipe))


def _versions(run: Path) -> str:
    file = run / "versions.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return table(("", ""), [(name, str(value)) for name, value in found.items()])


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file; a line that a crash cut short is left out."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as content:
        for line in content:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "step" in found:
                yield found
