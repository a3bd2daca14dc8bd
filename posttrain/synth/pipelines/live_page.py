"""A page that shows how a run goes, written again every few seconds; a browser that has it open reads it again."""

import time
from collections.abc import Callable
from html import escape
from pathlib import Path

from posttrain.errors import SynthError
from posttrain.synth.ledger import results
from posttrain.synth.ledger.live import line
from posttrain.synth.ledger.session import Progress
from posttrain.synth.pipelines.pictures import document, funnel, section, table
from posttrain.synth.pipelines.report import CELLS, Report, cells

EVERY = 2
"""Seconds between two pages."""


class LivePage:
    """Writes the page of a run while it goes; the step that is at work is the one behind the last row of the table."""

    def __init__(self, file: Path, folder: Path, also: Callable[[Progress], None]) -> None:
        self.file, self.folder, self.also = file, folder, also
        self._written = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show the progress, and write the page if it is time to."""
        self.also(progress)
        if time.monotonic() - self._written >= EVERY:
            self._written = time.monotonic()
            self.write(line(progress), EVERY)

    def write(self, now: str, again: int = 0) -> None:
        """Write the page; one that is not read again after the run."""
        try:
            report = Report.load(self.folder)
        except SynthError:  # nothing is there yet
            return
        names = ("step", *CELLS)
        rows = [[f"{stage.number} {stage.name}", *cells(stage)] for stage in report.stages]
        rows = [row + [""] * (len(names) - len(row)) for row in rows]
        body = funnel(report) + table(names, rows)
        parts = [f"<h1>{escape(report.task)}</h1>", f'<p class="note">{escape(now)}</p>', section("So far", body)]
        draft = self.file.with_name(self.file.name + ".part")
        with results.writing(self.file):
            draft.write_text(document(report.task, parts, again=again), encoding="utf-8")
            draft.replace(self.file)
