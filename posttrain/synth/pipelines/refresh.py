"""Generation while training: between two passes the model answers the prompts again, and trains on what comes of that.

What each pass was trained on is a function of the weights at its beginning, and stays in the run's folder. So a run
that goes on from a checkpoint reads the same rows, or makes the same rows again.
"""

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import gt, min_len

from posttrain.blocks.data.data import Data
from posttrain.blocks.data.sources import Source
from posttrain.errors import RecipeError, TrainingError
from posttrain.hooks import after, before
from posttrain.interfaces import StepBlock
from posttrain.registry import block, key

if TYPE_CHECKING:
    from torch import nn

    from posttrain.run import Run
    from posttrain.synth.pipelines.report import Report


@block("callback", "refresh")
class Refresh:
    """Replace the training data at the end of a pass by what the current weights answer (on-policy data).

    The first pass trains on `data`. Give `max_steps`: passes over answers are not all of the same length.
    """

    source: Source
    """Prompts."""
    steps: list[StepBlock] = key(factory=list, check=min_len(1))
    """From prompts to rows: `[{type: generate, n: 8}, {type: verify, function: exact}, {type: pair}]`. What has no
    `client` of its own is answered by the model that is training."""
    every: int = key(1, check=gt(0))
    """Passes over one set of answers."""
    batch_size: int = key(64, check=gt(0))
    """Prompts that are answered at a time."""

    @before("trainer.fit")
    def go_on(self, trainer: Any) -> None:
        """Use the rows of the pass that a checkpoint was in.

        Raises:
            RecipeError: it cannot work with this trainer.
        """
        if trainer.strategy.shards_parameters:
            raise RecipeError(
                "callbacks: refresh: the whole model must be on a device to generate, and this strategy shards it: "
                "use ddp, or generate between runs with a server"
            )
        if getattr(trainer, "precompute_reference", False):
            raise RecipeError("callbacks: refresh: precompute_reference knows only the rows that a run begins with")
        if not isinstance(trainer.data, Data):
            raise RecipeError(
                f"callbacks: refresh: {type(trainer.data).__name__} reads no sources, so it can read no others"
            )
        if trainer.data.streams:
            raise RecipeError("callbacks: refresh: a stream is never over, so that nothing would be refreshed")
        current = trainer.run.epoch // self.every * self.every
        if current:
            self.use(trainer, self.file(trainer.run, current))

    @after("trainer.count")
    def look(self, trainer: Any, result: None) -> None:
        """Generate when a pass is over."""
        run = trainer.run
        if not run.epoch_ended or run.epoch % self.every or run.step >= run.max_steps:
            return
        file = self.file(run, run.epoch)
        with run.unmeasured():
            if run.fabric.is_global_zero:
                report = self.generate(run, file)
                run.metrics.note(run.step, {"refresh/rows": float(report.stages[-1].rows_out), **facts(report)})
            run.fabric.barrier()
            self.use(trainer, file)
        run.position = {"epoch": run.epoch, "row": 0}

    def file(self, run: "Run", epoch: int) -> Path:
        """Return where the rows of a pass are."""
        return run.output_dir / "refresh" / f"pass-{epoch}.jsonl"

    def generate(self, run: "Run", file: Path) -> "Report":
        """Write the rows that come of the current weights.

        Raises:
            TrainingError: there are none.
        """
        from posttrain.synth.clients.transformers import TransformersSynth
        from posttrain.synth.ledger.live import silent
        from posttrain.synth.pipelines.pipeline import Pipeline

        network: Any = run.model.module.hf
        client = TransformersSynth(
            loaded=(network, run.tokenizer),
            weights=file.stem,  # and not their fingerprint: rounding must not draw other random numbers
            work_dir=_folder_for(file.with_suffix(""), fingerprint(network)),  # type: ignore[call-arg]  # of the base
            batch_size=self.batch_size,
        )
        report = Pipeline(list(self.steps)).run(self.source, client, "steps", progress=silent)
        if not report.stages[-1].rows_out:
            reasons = "; ".join(f"{n:,} {why}" for stage in report.stages for why, n in stage.dropped.items())
            raise TrainingError(f"callbacks: refresh: nothing came of the prompts after pass {run.epoch}: {reasons}")
        report.export(file)
        return report

    def use(self, trainer: Any, file: Path) -> None:
        """Train on the rows of a file from here on; evaluation goes on as it was."""
        run = trainer.run
        rows = [Source(name_or_path=str(file.absolute()))]
        data = attrs.evolve(trainer.data, sources=rows, eval_split=0.0, eval_sources=[])
        loaders = trainer.load_data(run.fabric, run.tokenizer, data)
        run.loaders = attrs.evolve(run.loaders, train=loaders.train)


def _folder_for(folder: Path, weights: str) -> Path:
    """Return a folder for the answers of some weights; what other weights have answered there is removed."""
    mark = folder / "weights"
    if mark.exists() and mark.read_text() != weights:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(weights)
    return folder


def facts(report: "Report") -> dict[str, float]:
    """Return the numbers that the steps have said, as metrics."""
    return {
        f"refresh/{stage.name}/{name}".replace(" ", "_"): value
        for stage in report.stages for name, value in stage.facts.items() if isinstance(value, float)
    }  # fmt: skip


def fingerprint(network: "nn.Module") -> str:
    """Return a text that differs where the weights do: a hash of the sum and the norm of every parameter."""
    import torch

    with torch.no_grad():
        sums = [
            (p.sum(dtype=torch.float64), torch.linalg.vector_norm(p, dtype=torch.float64)) for p in network.parameters()
        ]
        numbers = torch.stack([number for pair in sums for number in pair]).tolist()
    return hashlib.sha256(repr(numbers).encode()).hexdigest()
