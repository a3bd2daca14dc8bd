"""Callbacks that tell how fast a run is, and where its time goes."""

from pathlib import Path
from typing import Any

import attrs
from attrs.validators import ge, gt, optional

from posttrain.errors import RecipeError
from posttrain.hooks import after, before
from posttrain.registry import block, key

PEAKS = {
    "A100": 312.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200 NVL": 835.0, "H200": 989.0,
    "B200": 2250.0,
}  # fmt: skip
"""Part of a device's name -> 10^12 dense operations in bfloat16 a second (data sheets of NVIDIA)."""


@block("callback", "profiler")
class Profiler:
    """Record where the time of some steps goes, in `profile` of the run's folder.

    `trace-rank-N.json` opens in https://ui.perfetto.dev; `operators.txt` is rank zero's table, the slowest first.
    Recording slows the steps down.
    """

    skip: int = key(5, check=ge(1))
    """Steps to let pass; the first ones warm up kernels and memory. One more warms up the profiler."""
    steps: int = key(3, check=gt(0))
    """Steps to record."""
    ranks: list[int] = attrs.field(factory=lambda: [0])
    """Ranks that record."""
    memory: bool = False
    """Record allocations too."""
    stacks: bool = False
    """Record the lines of Python that called."""
    _running: list[Any] = attrs.field(factory=list, init=False, eq=False, repr=False)

    @before("trainer.fit")
    def start(self, trainer: Any) -> None:
        """Begin to count steps.

        Raises:
            RecipeError: the run ends before the recording would.
        """
        from torch.profiler import profile, schedule

        run, last = trainer.run, self.skip + 1 + self.steps
        if run.step + last > run.max_steps:
            raise RecipeError(
                f"callbacks: profiler: the run ends after step {run.max_steps}, but from step {run.step} on it takes "
                f"{last} steps to pass {self.skip}, warm up in one and record {self.steps}"
            )
        if run.fabric.global_rank in self.ranks:
            folder, rank = run.output_dir / "profile", run.fabric.global_rank
            profiler = profile(
                schedule=schedule(wait=self.skip, warmup=1, active=self.steps, repeat=1),
                on_trace_ready=lambda profiler: self.write(profiler, folder, rank),
                profile_memory=self.memory, with_stack=self.stacks,
            )  # fmt: skip
            profiler.start()
            self._running.append(profiler)

    @before("trainer.save")
    def step(self, trainer: Any, at_end: bool) -> None:
        """Take note of a step that is over, before checkpoints are written."""
        if self._running and at_end:
            self._running.pop().stop()
        elif self._running:
            self._running[0].step()

    def write(self, profiler: Any, folder: Path, rank: int) -> None:
        """Write what was recorded."""
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-rank-{rank}.json"))
        if rank == 0:
            average = profiler.key_averages()
            kind = "device" if any(event.self_device_time_total for event in average) else "cpu"
            (folder / "operators.txt").write_text(average.table(sort_by=f"self_{kind}_time_total", row_limit=40))


@block("callback", "mfu")
class MFU:
    """Log `tflops`, what each device computes in a second (10^12 operations), and `mfu`, its share of what the device
    can do at most (model FLOPs utilization, arXiv:2204.02311).

    The operations of matrix products and attention are counted as they are called in the first step of a process, so
    adapters, experts and networks of your own are counted as what they are. What a backward pass computes again to
    save memory is left out.
    """

    peak_tflops: float | None = key(None, check=optional(gt(0)))
    """Of the device, dense, in the precision of the run: by default what the data sheets of A100, H100, H200 and B200
    say of bfloat16. Of other devices `tflops` alone is logged."""
    _counting: list[Any] = attrs.field(factory=list, init=False, eq=False, repr=False)

    @before("trainer.step")
    def begin(self, trainer: Any, batches: list[Any]) -> None:
        """Count the first step."""
        from posttrain.blocks.callbacks.operations import Counting

        self.stop()  # of a run whose first step failed
        if "tflops" not in trainer.run.per_token:
            self._counting.append(Counting())
            self._counting[0].__enter__()

    @after("trainer.step")
    def end(self, trainer: Any, loss: Any) -> None:
        """Note what a token took."""
        run = trainer.run
        if counting := self.stop():
            run.per_token["tflops"] = counting.operations / 1e12 / max(1, sum(batch.tokens for batch in run.batches))
            if peak := self.peak_tflops or peak_of(run.fabric.device):
                run.per_token["mfu"] = run.per_token["tflops"] / peak

    def stop(self) -> Any:
        """Count no more; return what counted, if anything did."""
        for counting in self._counting:
            counting.__exit__(None, None, None)
        return self._counting.pop() if self._counting else None


def peak_of(device: Any) -> float | None:
    """Return how many 10^12 operations in bfloat16 a device does in a second at most, by its maker's data sheet."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)
