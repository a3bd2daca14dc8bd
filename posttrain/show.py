"""What people look at: tokens in colour, ledgers as tables, curves as pictures."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from posttrain.blocks.data import Preview

ROLE_COLORS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
TITLES = {
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "memory_gb": "peak memory (GiB)",
}
"""Metrics that are drawn unless others are asked for, if a run has them."""
NOISY = ("loss", "grad_norm")
FROM_ZERO = ("lr", "tokens_per_second", "memory_gb")


def tokens(previews: "Iterable[Preview]", console: "Console") -> None:
    """Print documents token by token: supervised ones on a coloured ground, or in [brackets] without colours."""
    from rich.rule import Rule
    from rich.text import Text

    plain = not console.is_terminal
    if plain:
        console.print("[supervised tokens are in brackets]", markup=False)
    else:
        console.print("[black on green]supervised[/] [dim]masked[/]  ↵ is a line break; one colour of text per role")
    for preview in previews:
        console.print(Rule(preview.source, style="dim"))
        text, last = Text(), ""
        for token, supervised, role in preview.tokens:
            if role != last:
                text.append(f"\n{role or '...':>9} │ ", style=f"bold {ROLE_COLORS.get(role, 'white')}")
                last = role
            shown = token.replace("\n", "↵")
            if plain:
                text.append(f"[{shown}]" if supervised else shown)
            else:
                text.append(shown, style="black on green" if supervised else f"dim {ROLE_COLORS.get(role, 'white')}")
        console.print(text)
        count = sum(supervised for _, supervised, _ in preview.tokens)
        console.print(f"\n{len(preview.tokens)} tokens, {count} of them supervised", style="dim", highlight=False)


def ledger(found: dict[str, Any]) -> "Table":
    """Return what became of the rows of each source, as a table."""
    from rich import box
    from rich.table import Table

    from posttrain.blocks.console import human

    parts = [("", found), ("held out: ", found.get("eval", {}))]
    entries = [(prefix + source, entry) for prefix, part in parts for source, entry in part.get("sources", {}).items()]
    known = ("rows_in", "dropped", "too_long", "tokens_cut", "documents", "tokens", "supervised_tokens")
    counted = [
        (name, {**entry, "dropped": sum(_count(n) for n in entry["dropped"].values())}) for name, entry in entries
    ]
    columns = [column for column in known if any(entry.get(column) for _, entry in counted)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("data", *columns):
        table.add_column(title.replace("_", " "), justify="left" if title == "data" else "right", overflow="fold")
    for name, entry in counted:
        table.add_row(name, *(human(entry.get(column, 0)) for column in columns))
    reasons = [
        f"{source}: {_count(count):,} dropped: {reason}"
        for source, entry in entries
        for reason, count in entry["dropped"].items()
    ]
    packing = found.get("packing")
    if packing:
        reasons.append(f"{packing['rows']:,} rows per pass, filled to {packing['filled']:.1%}")
    table.caption = "\n".join(reasons) or None
    table.caption_justify = "left"
    return table


def curves(runs: list[Path], names: list[str] | None, target: Path) -> None:
    """Draw the metrics of runs, one panel per metric and one line per run.

    Raises:
        PosttrainError: a run has no metrics, or matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise PosttrainError("drawing needs matplotlib: pip install 'posttrain[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {run: read_metrics(run) for run in runs}
    panels = names or [n for n in TITLES if n != "memory_gb" and any(series(lines, n)[0] for lines in found.values())]
    across = 2 if len(panels) > 1 else 1
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(down, across, figsize=(5.5 * across, 3.4 * down), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, panels, strict=False):
        for color, (run, lines) in zip(
            plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, found.items(), strict=False
        ):
            draw(axis, lines, name, str(run), color)
        axis.set_title(TITLES.get(name, name.replace("_", " ")), fontsize=11, loc="left")
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0] and (len(runs) > 1 or name == "loss"):
            axis.legend(frameon=False, fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.savefig(target, dpi=140)
    plt.close(figure)


def draw(axis: Any, lines: list[dict[str, Any]], name: str, label: str, color: str) -> None:
    """Draw one metric of one run: the raw values faintly, their running mean over them, evaluation as points."""
    steps, values = series(lines, name)
    if not steps:
        return
    noisy = name in NOISY and len(values) > 20
    if noisy:
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smoothed(values) if noisy else values, color=color, linewidth=1.6, label=label)
    if name in FROM_ZERO:
        axis.set_ylim(bottom=0)
    held_out = series(lines, f"eval_{name}")
    if held_out[0]:
        axis.plot(*held_out, color=color, linestyle="none", marker="o", markersize=4, label=f"{label}, held out")


def smoothed(values: list[float]) -> list[float]:
    """Return the exponential mean of a curve, with the bias of its beginning taken out."""
    decay, mean, weight, found = 0.9, 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        found.append(mean / weight)
    return found


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was logged, and its values."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in pairs], [value for _, value in pairs]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run.

    Raises:
        PosttrainError: there are none, or a line is damaged.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PosttrainError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            found.append({**values, "step": int(values["step"])})
        except (ValueError, KeyError, TypeError):
            raise PosttrainError(f"{path}:{number}: not a line of metrics") from None
    if not found:
        raise PosttrainError(f"{path} holds no metrics yet")
    return found


def _count(dropped: int | dict[str, Any]) -> int:
    return dropped if isinstance(dropped, int) else int(dropped["count"])
