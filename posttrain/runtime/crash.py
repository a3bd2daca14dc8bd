"""What a run that died leaves in its folder: enough to see why, without running it again."""

import json
import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.batch import Batch
from posttrain.errors import TrainingError
from posttrain.runtime.failures import lost_connection
from posttrain.runtime.folder import versions

if TYPE_CHECKING:
    from posttrain.run import Run
    from posttrain.trainer import Trainer

log = logging.getLogger(__name__)


@contextmanager
def reported(trainer: "Trainer") -> Iterator[None]:
    """Report an error that ends a run, and let it pass."""
    try:
        yield
    except Exception as error:
        report(trainer, error, rows=True)
        raise


def report(trainer: "Trainer", error: BaseException, rows: bool = False) -> None:
    """Write `failure.txt` (traceback, last metrics, versions) and `failure-rows.jsonl`, what the step trained on.

    Each rank whose own error it was writes; with several, the names end in the rank. What goes wrong here is logged:
    the error that the run died of must stay the one to read.

    Args:
        trainer: with its run.
        error: what ended it.
        rows: whether to read the rows of the step again: it cannot be done while another thread may be reading.
    """
    run = trainer.run
    if lost_connection(error):
        return
    step = (error.step if isinstance(error, TrainingError) else None) or run.step + 1
    file = run.output_dir / f"failure{run.suffix}.txt"
    try:
        file.write_text("\n".join(_lines(run, step, error)) + "\n", encoding="utf-8")
        if rows and step in run.began:
            again = (batch for batch, _ in run.loaders.train.batches(run.began[step]))
            found = run.batches if step == run.step + 1 else islice(again, trainer.gradient_accumulation_steps)
            write_rows(run, step, found, run.output_dir / f"failure-rows{run.suffix}.jsonl", "w")
        log.info("what is known of it is in %s", file)
    except Exception as second:  # the disk may be full, the data may be what failed
        log.info("%s could not be written whole: %s: %s", file, type(second).__name__, second)


def skip(trainer: "Trainer", batches: "list[Batch]") -> None:
    """Count a step whose update is left out, and keep its rows if the recipe wants that (a loss scale skips, too).

    Raises:
        TrainingError: it is one of many in a row.
    """
    run = trainer.run
    if trainer.on_nonfinite == "skip":
        write_rows(run, run.step + 1, batches, run.output_dir / f"skipped-rows{run.suffix}.jsonl", "a")
    run.skip()


def write_rows(run: "Run", step: int, batches: "Iterable[Batch]", file: Path, mode: str) -> None:
    """Write the documents of a step's micro-batches, one JSON object each: their text and what of it is trained."""
    with file.open(mode, encoding="utf-8") as out:
        for number, batch in enumerate(batches):
            for row, ids, trained in Batch.of(batch).documents():
                found = {"step": step, "micro_batch": number, "row": row, "tokens": len(ids)}
                if hasattr(run.tokenizer, "decode"):
                    found |= {"text": run.tokenizer.decode(ids), "supervised": run.tokenizer.decode(trained)}
                out.write(json.dumps(found | {"input_ids": ids}) + "\n")


def _lines(run: "Run", step: int, error: BaseException) -> Iterator[str]:
    fabric = run.fabric
    yield f"step {step} of {run.max_steps} failed on rank {fabric.global_rank} of {fabric.world_size}"
    yield f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; this process began at step {run.first_step}"
    place = {key: value for key, value in run.began.get(step, run.position).items() if key != "ledger"}
    yield f"data from {json.dumps(place)} on\n"
    yield "".join(traceback.format_exception(error))
    yield "last metrics"
    yield from (f"  {name} {value:g}" for name, value in run.last.items())
    yield "\nversions"
    yield from (f"  {name} {value}" for name, value in versions().items())
