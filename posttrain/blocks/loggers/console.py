"""The loggers of our own: a terminal that says how it goes, and a JSONL file."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from posttrain.blocks.loggers.ledger import ledger
from posttrain.errors import TrainingError
from posttrain.runtime.ours import is_checkpoint
from posttrain.runtime.terminal import logged_to
from posttrain.words import counted, duration, human

if TYPE_CHECKING:
    from rich.console import RenderableType

    from posttrain.run import Run

WIDE = 160
"""Columns of tables in a log file, where 80 would break words."""
OTHERS = (
    "loss",
    "lr",
    "epoch",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "memory_gb",
    "skipped_steps",
)
"""Metrics that the line of a step shows in another place, or not; it shows all others, also those of your own."""
COLORS = {"finished": "green", "interrupted": "yellow", "failed": "red"}


class Live(Progress):
    """A bar that follows the run by itself: metrics come only every `log_every` steps, and not in an evaluation."""

    def __init__(self, run: "Run", *columns: ProgressColumn, **options: Any) -> None:
        self.run = run
        super().__init__(*columns, **options)

    def get_renderables(self) -> "Iterable[RenderableType]":
        """Return the bar as the run is now."""
        for task in self.task_ids:
            self.update(task, completed=self.run.step, doing=self.run.doing)
        return super().get_renderables()


class News(ProgressColumn):
    """The metrics, of which those that a narrow terminal has no room for are left out."""

    def render(self, task: Task) -> Text:
        """Return them in one line."""
        return Text(str(task.fields["news"]), no_wrap=True, overflow="ellipsis")


class ConsoleLogger:
    """A live line on a terminal; elsewhere a plain line each time metrics arrive. A summary at the end."""

    def __init__(self, run: "Run", console: Console | None = None) -> None:
        self.run = run
        self.console = console or Console()
        if console is None and not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = WIDE
        self.began = time.perf_counter()
        self.tokens = 0.0
        self.losses: list[float] = []
        self.progress = Live(
            run,
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(bar_width=14), News(),
            TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("left"),
            TextColumn("[dim]{task.fields[doing]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.told = ""
        self.tell()
        self.say(self.opening())
        terminal, self.lines = sys.stderr, ExitStack()
        self.progress.start()
        if terminal.isatty():
            self.lines.enter_context(logged_to(sys.stderr, instead_of=terminal))
        self.task = self.progress.add_task("", total=run.max_steps, completed=run.step, news="", speed="", doing="")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Show a step's metrics; those of a batch of steps come with the throughput of its last one."""
        assert step is not None
        self.tokens += metrics.get("tokens", 0.0)
        if "loss" in metrics:
            self.losses.append(metrics["loss"])
        due = "memory_gb" in metrics
        if due and self.console.is_terminal:
            line = {name: value for name, value in metrics.items() if not name.startswith("eval_")}  # printed below
            self.progress.update(self.task, news=self.news(line), speed=self.speed(line))
        elif due:
            self.say(
                f"step {step:,}/{self.run.max_steps:,}  {self.news(metrics)}  {self.speed(metrics)}  {self.left(step)}"
            )
        names = (name for name in metrics if name.startswith("eval_") and is_headline(name))
        found = "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
        if found and self.console.is_terminal:
            self.say(f"step {step:,}/{self.run.max_steps:,}  {found}")

    def say(self, line: str | Text) -> None:
        """Print a line; where it is too long, the terminal or the reader's editor may break it, not we."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def finalize(self, status: str) -> None:
        """Print how the run went, and where everything is."""
        self.lines.close()
        self.progress.stop()
        self.tell()
        self.console.print(self.closing(status))

    def tell(self) -> None:
        """Print what became of the rows, unless it was said already: of a stream it is known at the end alone."""
        found = self.run.loaders.ledger
        rows = any(part.get("sources") for part in (found, found.get("eval", {})))
        if rows and (now := json.dumps(found)) != self.told:
            self.told = now
            self.console.print(ledger(found))

    def opening(self) -> Text:
        """Return a line or two on what is about to be trained."""
        from posttrain.blocks.models.quantized.sizes import groups

        run = self.run
        sizes = groups(run.model)
        total, trained = sum(g.numbers for g in sizes), sum(g.numbers for g in sizes if g.trained)
        share = "" if total == trained else f", {human(trained)} of them trained"
        begin = f", going on after step {run.step}" if run.step else ""
        code = f"\nwith code of {', '.join(map(str, run.recipe['code']))}" if run.recipe.get("code") else ""
        return Text.assemble(
            (str(run.recipe["type"]), "bold"),
            f": {human(total)} parameters{share}; {counted(run.max_steps, 'step')} of "
            f"{counted(run.rows_per_step, 'row')} on {run.fabric.world_size} x {run.fabric.device.type}{begin}{code}"
            + (f"\nparameters: {'; '.join(map(str, sizes))}" if len(sizes) > 1 else ""),
        )

    def news(self, metrics: dict[str, float]) -> str:
        """Return the metrics that fit into a line."""
        parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        parts += [f"{metrics['skipped_steps']:.0f} left out"] if "skipped_steps" in metrics else []
        wanted = [name for name in metrics if name not in OTHERS]
        parts += [f"{name.removeprefix('rewards/')} {metrics[name]:.4f}" for name in wanted if is_headline(name)]
        if "epoch" in metrics:
            parts.append(f"epoch {metrics['epoch']:.2f}")
        if "lr" in metrics:
            parts.append(f"lr {metrics['lr']:.1e}")
        return "  ".join(parts)

    def speed(self, metrics: dict[str, float]) -> str:
        """Return the tokens per second."""
        return f"{human(metrics['tokens_per_second'])} tok/s" if "tokens_per_second" in metrics else ""

    def left(self, step: int) -> str:
        """Return the time that the remaining steps will take at the average pace so far."""
        pace = (time.perf_counter() - self.began) / max(1, step - self.run.first_step)
        return f"{duration(pace * (self.run.max_steps - step))} left"

    def closing(self, status: str) -> Table:
        """Return the summary."""
        run, seconds = self.run, time.perf_counter() - self.began
        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        table.add_column()
        table.add_row("status", Text(status, COLORS.get(status, "white")))
        steps = f"{run.step:,} of {run.max_steps:,}"
        table.add_row("steps", Text(f"{steps}  ({run.stop})" if run.stop else steps))
        if skipped := run.memory.get("skipped_steps"):
            table.add_row("left out", f"{counted(skipped, 'step')}, whose gradients were not finite", style="yellow")
        table.add_row("epochs", f"{run.epochs:.3g}" if run.rows_per_epoch else f"{run.epoch} (a stream)")
        if self.losses:
            table.add_row("loss", f"{self.losses[0]:.4f} -> {self.losses[-1]:.4f}")
        for name, value in run.last.items():
            if name.startswith("eval_") and is_headline(name):
                table.add_row(name.replace("_", " "), f"{value:.4f}")
        if self.tokens:
            table.add_row("tokens", f"{human(self.tokens)}  ({human(self.tokens / seconds)} per second over all)")
        table.add_row("time", duration(seconds))
        if "memory_gb" in run.last:
            table.add_row("peak memory", f"{run.last['memory_gb']:.2f} GiB")
        table.add_row("folder", Text(str(run.output_dir)))
        if status == "interrupted":
            how = "run the same command again" + (" with resume=auto" if run.recipe.get("resume") == "never" else "")
            saved = any(map(is_checkpoint, run.output_dir.iterdir()))
            table.add_row("to go on", Text(how if saved else "not possible: nothing was saved (checkpoint: [resume])"))
        return table


def is_headline(name: str) -> bool:
    """Whether people look at a metric as it comes; of groups (`rewards/chosen`) that is how often and how clearly."""
    return "/" not in name or name.endswith(("/accuracy", "/margin"))


class JSONLLogger:
    """One JSON object per step, in the order of steps."""

    def __init__(self, path: Path, step: int) -> None:
        forget_after(path, step)
        self.file = path.open("a")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a line.

        Raises:
            TrainingError: the disk is full.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
            self.file.flush()
        except OSError as error:
            raise TrainingError(f"{self.file.name} cannot be written: {error.strerror or error}") from None

    def finalize(self, status: str) -> None:
        """Close the file."""
        with suppress(OSError):  # of what could not be written before
            self.file.close()


def forget_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a file of JSON lines: they will be written again."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    """Return a line's step; a line that a crash cut short belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
