"""What became of the rows of a pipeline: a file per step, another of what it dropped, and the counts."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from posttrain.errors import SynthError
from posttrain.synth.ledger import results
from posttrain.synth.ledger.standing import Counts
from posttrain.synth.pipelines.rows import Drop, Row

if TYPE_CHECKING:
    from rich.console import Group

COUNTS = "report.json"
UNDER_WAY = "it is running, or was stopped on the way"
CELLS = ("in", "new", "out", "dropped", "requests", "failed", "tokens", "cost")


@attrs.define
class Stage:
    """What one step did."""

    number: int
    """From 1 on; 0 is where the rows came from."""
    name: str
    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = attrs.field(factory=dict)
    """Reason -> rows."""
    requests: int = 0
    asked_again: int = 0
    """Of the requests, those that took the place of a reply that was of no use."""
    failed: int = 0
    """Requests without a result."""
    trouble: str = ""
    """What was wrong with them, as a paragraph."""
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = 0.0
    """Dollars; None if a price is not known."""
    facts: dict[str, str | float] = attrs.field(factory=dict)
    """What else the step has to say."""

    def count(self, counts: Counts, trouble: str, local: bool = False) -> None:
        """Take in how one of its tasks stands; what is answered here and not by a server counts for no request."""
        self.failed += counts.failed
        self.trouble = "\n".join(part for part in (self.trouble, trouble) if part)
        if local:
            return
        self.requests += counts.total
        self.input_tokens += counts.input_tokens
        self.output_tokens += counts.output_tokens
        self.cost = None if self.cost is None or counts.cost is None else self.cost + counts.cost

    @property
    def file(self) -> str:
        """Name of the file with the rows that it passed on."""
        return f"{self.number}-{self.name}.jsonl"

    @property
    def dropped_file(self) -> str:
        """Name of the file with the rows that it dropped; each has a column `dropped` that says why."""
        return f"{self.number}-{self.name}.dropped.jsonl"


@attrs.define
class Report:
    """The folder of a pipeline, and its counts."""

    folder: Path
    task: str
    stages: list[Stage] = attrs.field(factory=list)
    unfinished: str = ""
    """Why the last steps have not been taken; empty if all were."""

    @classmethod
    def load(cls, folder: Path) -> "Report":
        """Return the report that a run has left.

        Raises:
            SynthError: there is none in the folder.
        """
        try:
            found = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
            stages = [Stage(**stage) for stage in found["stages"]]
            return cls(folder, found["task"], stages, found["unfinished"])
        except FileNotFoundError:
            raise SynthError(
                f"{folder} holds no {COUNTS}: give the folder `work_dir/task` of a pipeline that was run"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise SynthError(
                f"{folder / COUNTS} cannot be read: {error!r}; run the pipeline again to write it"
            ) from None

    # -- while a pipeline runs --------------------------------------------------------

    def begin(self, rows: Iterable[Row]) -> Path:
        """Write the rows that come in, and return their file.

        Raises:
            SynthError: there are none.
        """
        stage = self.stage(0, "source")
        self.save(UNDER_WAY)  # what an earlier run has left here is over
        file = self.write(stage, rows)
        stage.rows_in = stage.rows_out
        if not stage.rows_out:
            raise SynthError("there are no rows to begin with: the source is empty")
        return file

    def stage(self, number: int, name: str) -> Stage:
        """Begin a step, with what the one before has passed on."""
        made = Stage(number, name, rows_in=self.stages[-1].rows_out if self.stages else 0)
        self.stages.append(made)
        return made

    def write(self, stage: Stage, made: Iterable[Row | Drop]) -> Path:
        """Write what a step makes, and count it; return the file of the rows that go on."""
        file, reasons = self.folder / stage.file, Counter[str]()
        dropped = self.folder / (stage.dropped_file + ".part")

        def passed() -> Iterator[Row]:
            with results.lines_into(dropped) as aside:
                for row in made:
                    if isinstance(row, Drop):
                        reasons[row.reason] += 1
                        why = {"step": stage.name, "reason": row.reason, "detail": row.detail}
                        aside({**row.row, "dropped": why})
                    else:
                        yield row

        stage.rows_out = results.to_jsonl(passed(), file)
        if reasons:
            dropped.replace(self.folder / stage.dropped_file)
        else:
            dropped.unlink()
            (self.folder / stage.dropped_file).unlink(missing_ok=True)
        stage.dropped = dict(reasons.most_common())
        return file

    def close(self) -> None:
        """Write the counts, and forget files of steps that are no longer there."""
        known = {COUNTS, *(s.file for s in self.stages), *(s.dropped_file for s in self.stages)}
        for file in self.folder.glob("*.jsonl"):
            if file.name not in known:
                file.unlink()
        self.save()

    def save(self, unfinished: str | None = None) -> None:
        """Write the counts so far, and why there are no more."""
        stages = [attrs.asdict(stage) for stage in self.stages]
        for stage in stages:
            stage["facts"] = {k: None if v != v else v for k, v in stage["facts"].items()}
        why = self.unfinished if unfinished is None else unfinished
        text = json.dumps({"task": self.task, "unfinished": why, "stages": stages}, indent=1)
        with results.writing(self.folder / COUNTS):
            (self.folder / COUNTS).write_text(text, encoding="utf-8")

    # -- afterwards -------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        """Yield what came out of the last step.

        Raises:
            SynthError: the pipeline is not finished.
        """
        if self.unfinished:
            raise SynthError(f"the pipeline is not finished: {self.unfinished}")
        return (row for row, _ in rows_in(self.folder / self.stages[-1].file))

    def dropped(self) -> Iterator[Row]:
        """Yield what the steps dropped, with the reason in the column `dropped`."""
        for stage in self.stages:
            file = self.folder / stage.dropped_file
            if file.exists():
                yield from (row for row, _ in rows_in(file))

    def export(self, path: str | Path, dropped: bool = False) -> int:
        """Write the rows, or what was dropped, as .jsonl or .parquet; return how many."""
        rows, path = self.dropped() if dropped else self.rows(), Path(path)
        return (results.to_parquet if path.suffix == ".parquet" else results.to_jsonl)(rows, path)

    @property
    def failed(self) -> int:
        """Requests without a result, of all steps."""
        return sum(stage.failed for stage in self.stages)

    @property
    def cost(self) -> float | None:
        """Dollars, of all steps; None if a price is not known."""
        costs = [stage.cost for stage in self.stages]
        return None if None in costs else sum(cost or 0.0 for cost in costs)

    def table(self) -> "Group":
        """Return the counts for a terminal."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        made = Table("step", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in CELLS:
            made.add_column(name, justify="right")
        for stage in self.stages:
            made.add_row(Text(f"{stage.number} {stage.name}"), *cells(stage))
        made.add_section()
        tokens = sum(stage.input_tokens + stage.output_tokens for stage in self.stages)
        requests = sum(stage.requests for stage in self.stages)
        made.add_row("all", "", "", "", "", f"{requests:,}", f"{self.failed:,}", f"{tokens:,}", dollars(self.cost))
        lines = []
        for stage in self.stages:
            lines += [f"{stage.number} {stage.name}: asked again {stage.asked_again:,}"] if stage.asked_again else []
            lines += [f"{stage.number} {stage.name} dropped {n:,}: {reason}" for reason, n in stage.dropped.items()]
            lines += [f"{stage.number} {stage.name}: {name} {plain(value)}" for name, value in stage.facts.items()]
        return Group(made, *(Text(line) for line in lines))


def rows_in(file: Path) -> Iterator[tuple[Row, str]]:
    """Yield the rows of a file of JSON lines, each with its place."""
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield json.loads(line), f"{file}:{number}"


def plain(value: str | float | None) -> str:
    """Return a fact as text."""
    if value is None or value != value:
        return "unknown"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def dollars(cost: float | None) -> str:
    """Return a cost as text."""
    return "unknown" if cost is None else f"${cost:.4f}"


def cells(stage: Stage) -> list[str]:
    """Return the numbers of a step as text: in, new, out, dropped (in + new = out + dropped: several answers to a row
    are new ones, a pair joins two); and requests, failed, tokens, cost if it sent any."""
    dropped = sum(stage.dropped.values())
    new = stage.rows_out + dropped - stage.rows_in
    made = ["", ""] if stage.number == 0 else [f"{stage.rows_in:,}", f"{new:+,}" if new else ""]
    made += [f"{stage.rows_out:,}", f"{dropped:,}" if dropped else ""]
    if stage.requests:
        tokens = stage.input_tokens + stage.output_tokens
        made += [f"{stage.requests:,}", f"{stage.failed:,}", f"{tokens:,}", dollars(stage.cost)]
    return made
