"""A recipe of `posttrain synth`: rows of a source, a client, steps -> rows to train on."""

from collections.abc import Iterator
from pathlib import Path

import attrs
from attrs.validators import min_len

from posttrain.blocks.data.sources import Source
from posttrain.interfaces import StepBlock, SynthBlock
from posttrain.recipes import load as recipe
from posttrain.recipes.structure import structure_as
from posttrain.registry import key
from posttrain.synth.clients.client import Synth
from posttrain.synth.pipelines.pipeline import Pipeline
from posttrain.synth.pipelines.report import Report
from posttrain.synth.pipelines.step import Step


@attrs.frozen(kw_only=True, slots=False)
class SynthRecipe:
    """What `posttrain synth run` makes."""

    task: str = key("task", check=min_len(1))
    """Name of what is made: of the folder in the client's `work_dir`, and of the tasks in its ledger."""
    client: SynthBlock
    """Where requests go: `{type: openai, base_url: ..., work_dir: runs/hello}`, azure, vllm, cortex, transformers."""
    source: Source
    """The rows to begin with."""
    steps: list[StepBlock] = key(factory=list, check=min_len(1))
    """What is done, in order: `[{type: generate, template: ...}, {type: judge, ...}]`. `posttrain blocks step` lists
    what there is."""
    output: Path | None = None
    """A .jsonl or .parquet file for the rows; trainers read it as a source."""
    dropped: Path | None = None
    """A .jsonl or .parquet file for what the steps dropped, with the reasons."""
    code: list[Path] = attrs.field(factory=list)
    """Python files with steps and verifiers of your own, imported before the recipe is read."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what cannot be honoured."""
        for name in ("output", "dropped"):
            path = getattr(self, name)
            if path is not None and path.suffix not in (".jsonl", ".parquet"):
                yield name, f"must end in .jsonl or .parquet, got {path}"
        if not isinstance(self.client, Synth):
            yield "client", f"{type(self.client).__name__} is no client of posttrain.synth"
        for number, step in enumerate(self.steps):
            if not isinstance(step, Step):
                yield "steps", f"entry {number}: {type(step).__name__} is no subclass of posttrain.synth.Step"
        if isinstance(self.client, Synth):
            yield from (
                ("steps", f"step {number}: {message}") for number, message in self.pipeline.problems(self.client)
            )

    @property
    def synth(self) -> Synth:
        """The client."""
        assert isinstance(self.client, Synth)
        return self.client

    @property
    def pipeline(self) -> Pipeline:
        """The steps."""
        return Pipeline([step for step in self.steps if isinstance(step, Step)])

    @property
    def folder(self) -> Path:
        """Where each step leaves its rows."""
        return self.synth.work_dir / self.task

    def export(self, report: Report) -> Iterator[str]:
        """Write what the recipe wants written, and say what that was."""
        if self.output is not None:
            yield f"{report.export(self.output):,} rows in {self.output}"
        if self.dropped is not None:
            yield f"{report.export(self.dropped, dropped=True):,} dropped rows in {self.dropped}"


def load(path: Path, overrides: list[str]) -> SynthRecipe:
    """Return the recipe in a file, or say everything that is wrong with it.

    Raises:
        RecipeError: with a line for each problem.
    """
    begins = "`client: {type: openai, ...}`, then `source:`, `steps:` and what differs"
    return recipe.load_as(lambda data: structure_as(data, SynthRecipe), path, overrides, begins)
