"""Curves of the metrics that runs wrote to `metrics.jsonl`."""

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from posttrain.errors import PosttrainError, RecipeError
from posttrain.registry import suggest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve: TypeAlias = tuple[list[float], list[float]]
"""Steps, values."""

TITLES = {
    "loss": ("Loss", "nats"),
    "rewards/accuracy": ("How often the chosen side wins", ""),
    "rewards/margin": ("Margin of rewards", ""),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "tokens_per_second": ("Throughput", "tokens / s"),
}
"""Metrics drawn unless others are asked for -> title, unit."""

STEADY = ("lr", "tokens_per_second")
"""Metrics that are not smoothed, and whose axis begins at 0."""

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#4b5563")
STYLE = {
    "figure.dpi": 150, "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9ca3af", "axes.linewidth": 0.8,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e5e7eb", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "xtick.color": "#6b7280", "ytick.color": "#6b7280", "axes.labelcolor": "#374151", "axes.formatter.limits": (-3, 5),
    "legend.frameon": False,
}  # fmt: skip


def curves(runs: list[Path], metrics: list[str] | None, target: Path) -> None:
    """Draw one panel per metric, with one line per run.

    Args:
        runs: folders of runs, or files of metrics.
        metrics: their names; None for those of `TITLES` that there are.
        target: the picture to write.

    Raises:
        PosttrainError: a run cannot be read, no run has the metric, or matplotlib is not installed.
    """
    names = [run.resolve().name for run in runs]
    labels = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    found = dict(zip(labels, map(read, runs), strict=True))
    known = {name for metrics_of_run in found.values() for name in metrics_of_run}
    for name in metrics or ():
        if name not in known:
            there = ", ".join(sorted(known))
            raise RecipeError(f"no run has a metric {name!r}{suggest(name, known)} (there are: {there})")
    chosen = list(dict.fromkeys(metrics)) if metrics else [name for name in TITLES if name in known] or sorted(known)
    try:
        _draw(found, chosen, target)
    except ImportError:
        raise PosttrainError("drawing needs matplotlib: pip install 'posttrain[plot]'") from None
    except (OSError, ValueError) as error:  # ValueError: a file type that matplotlib does not know
        raise PosttrainError(f"{target} cannot be written: {error}") from None


def bars(labels: list[str], shares: list[float], title: str, target: Path) -> None:
    """Draw shares between 0 and 1 as bars.

    Raises:
        PosttrainError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        with pyplot.rc_context(STYLE):
            figure, axis = pyplot.subplots(figsize=(4.6, 2.7), layout="constrained")
            drawn = axis.bar(labels, shares, color=COLOURS[0], width=0.6)
            axis.bar_label(drawn, [f"{share:.0%}" for share in shares], color="#374151")
            axis.set_title(title)
            axis.set_ylim(0, 1.08)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target)
            pyplot.close(figure)
    except ImportError:
        raise PosttrainError("drawing needs matplotlib: pip install 'posttrain[plot]'") from None
    except (OSError, ValueError) as error:
        raise PosttrainError(f"{target} cannot be written: {error}") from None


def read(run: Path) -> dict[str, Curve]:
    """Return the curve of each metric of a run.

    Raises:
        PosttrainError: there are no metrics, or a line is damaged.
    """
    file = run / "metrics.jsonl" if run.is_dir() else run
    if not file.is_file():
        raise PosttrainError(f"{run} is not the folder of a run: there is no {file}")
    curves: dict[str, Curve] = {}
    lines = file.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        row = _row(line, f"{file}:{number}", last=number == len(lines))
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    if not curves:
        raise PosttrainError(f"{file} holds no metrics yet")
    return curves


def _row(line: str, where: str, last: bool) -> dict[str, Any]:
    if not line.strip():
        return {}
    try:
        row = json.loads(line)
    except ValueError as error:
        if last:  # a run is writing it, or was killed while it did
            return {}
        raise PosttrainError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
        raise PosttrainError(f'{where}: expected an object with a number "step", got {line[:60]}')
    return row


def smooth(values: list[float], passes: int = 2) -> list[float]:
    """Return a centred running mean over some 5 % of the curve: unlike one that looks back, it does not lag."""
    for _ in range(passes):
        sums = [0.0, *itertools.accumulate(values)]
        last, reach = len(values) - 1, max(1, len(values) // 40)
        spans = [(max(0, i - reach), min(last, i + min(reach, i)) + 1) for i in range(len(values))]
        values = [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]
    return values


def _draw(curves: dict[str, dict[str, Curve]], metrics: list[str], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(4.6 * columns + 0.4, 2.7 * rows + 0.5), squeeze=False, layout="constrained"
        )
        for axis, metric in zip(axes.flat, metrics, strict=False):
            _panel(axis, metric, curves)
        for axis in axes.flat[len(metrics) :]:
            axis.set_visible(False)
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
        if len(curves) > 1:
            lines = [pyplot.Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=2) for i in range(len(curves))]
            figure.legend(lines, list(curves), loc="outside upper left", ncols=min(4, len(curves)))
        else:
            figure.suptitle(next(iter(curves)), x=0.01, ha="left", fontsize=11, color="#374151")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
        pyplot.close(figure)


def _panel(axis: "Axes", metric: str, curves: dict[str, dict[str, Curve]]) -> None:
    """Draw one metric: thin as it was measured, strong as it runs on average, evaluations as points."""
    title, unit = TITLES.get(metric, (metric.replace("_", " ").capitalize(), ""))
    axis.set_title(title)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(unit)
    evaluation = f"eval_{metric}"
    smoothed = False
    for index, found in enumerate(curves.values()):
        colour = COLOURS[index % len(COLOURS)]
        if metric in found:
            steps, values = found[metric]
            if smoothed := smoothed or (metric not in STEADY and len(values) >= 60):
                axis.plot(steps, values, color=colour, alpha=0.22, lw=0.8)
            axis.plot(steps, smooth(values) if smoothed else values, color=colour, lw=1.6)
        if evaluation in found:
            axis.plot(*found[evaluation], color=colour, lw=1.0, ls="--", marker="o", ms=3.5, mfc="white", mew=1.2)
    if any(evaluation in found for found in curves.values()):
        axis.plot([], [], color="#4b5563", lw=1.6, label="training" + (" (running mean)" if smoothed else ""))
        axis.plot([], [], color="#4b5563", lw=1.0, ls="--", marker="o", ms=3.5, mfc="white", label="evaluation")
        axis.legend(fontsize=8)
    axis.margins(x=0.02)
    axis.yaxis.set_major_formatter(lambda value, _: _tick(value))
    bottom, top = axis.get_ylim()
    if 0 < bottom < 0.4 * top or (metric in STEADY and top > 0):
        axis.set_ylim(bottom=0)  # where that costs little: a curve cut off at its bottom overstates how much changed


def _tick(value: float) -> str:
    """Write a number on the axis: 20k, 0.5, 2e-5."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    mantissa, _, exponent = (f"{value:g}" if abs(value) >= 1 else f"{value:.3g}").partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
