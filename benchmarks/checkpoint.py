"""How long saving a checkpoint holds training up, and how long it takes until it is on disk.

A Llama of some 70 million parameters (840 MB with AdamW's moments) on the CPU, written while
training goes on and written at once.

    python benchmarks/checkpoint.py [--folder DIR]
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

CONFIG = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 12,
    "num_key_value_heads": 12,
}  # fmt: skip
STEPS, EVERY = 33, 8
"""Far enough apart for one checkpoint to be on disk before the next begins."""


def measured(folder: Path, asynchronous: bool) -> tuple[float, float, float]:
    """Return seconds that training waited for a checkpoint, seconds until it was sealed, and its size in MB."""
    from toy import trainer

    import posttrain
    from posttrain.blocks.checkpoints import manifest
    from posttrain.blocks.checkpoints.checkpoint import Resume

    began: list[float] = []
    waited: list[float] = []
    sealed: list[float] = []

    @posttrain.before("checkpoint.save")
    def begin(block: Any, run: Any, at_end: bool) -> None:
        began.append(time.perf_counter())

    @posttrain.after("checkpoint.save")
    def end(block: Any, nothing: None) -> None:
        waited.append(time.perf_counter() - began[-1])

    publish = manifest.publish

    def note(*args: Any) -> None:
        publish(*args)
        sealed.append(time.perf_counter())

    manifest.publish = note
    saving = [Resume(every=EVERY, at_end=False, keep=1, asynchronous=asynchronous)]
    made = trainer(folder, model={"config": CONFIG}, max_steps=STEPS, checkpoint=saving, logger=[])
    made.train(callbacks=[begin, end])
    manifest.publish = publish
    saves = slice(EVERY - 1, STEPS, EVERY)  # the calls that save; the others return at once
    size = sum(file.stat().st_size for file in next(folder.glob("step-*")).iterdir()) / 1e6
    return (
        statistics.median(waited[saves]),
        statistics.median(at - start for at, start in zip(sealed, began[saves], strict=True)),
        size,
    )


def main() -> None:
    """Print a table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    base = parser.parse_args().folder
    logging.disable(logging.INFO)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {STEPS // EVERY} checkpoints\n")
    print("| written | training waits, s | on disk after, s | MB |")
    print("|---|---|---|---|")
    for name, asynchronous in (("while training goes on", True), ("at once", False)):
        with tempfile.TemporaryDirectory(dir=base) as folder:
            waited, sealed, size = measured(Path(folder), asynchronous)
        print(f"| {name} | {waited:.2f} | {sealed:.2f} | {size:.0f} |")


if __name__ == "__main__":
    main()
