"""A profile of some steps, and what it says: the slowest kernels, and how long the device had nothing to do."""

import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gpu_sft

LARGEST = 15 * 2**20
"""Bytes of a trace that is kept."""


def recorded(setting: Any, out: Path, steps: int) -> dict[str, Any]:
    """Train with a profiler, keep its table and its trace, and return what they say."""
    from posttrain.blocks.callbacks import Profiler

    setting.steps = steps + 2 - gpu_sft.WARM_UP  # all that there are
    with tempfile.TemporaryDirectory() as folder:
        result = gpu_sft.posttrain_(
            setting, callbacks=[Profiler(skip=1, steps=steps)], folder=folder,
            trainer={"max_steps": steps + 2, "log_every": 5},
        )  # fmt: skip
        found = Path(folder) / "profile"
        shutil.copy(found / "operators.txt", out / "operators.txt")
        trace = (found / "trace-rank-0.json").read_bytes()
    packed = gzip.compress(trace)
    if len(packed) <= LARGEST:
        (out / "trace.json.gz").write_bytes(packed)
    return {**said(json.loads(trace)["traceEvents"]), "steps": steps, "rate while recording": round(result["rate"])}


def said(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of the time in which the device was idle, and the five kernels that took most of it.

    Args:
        events: of a Chrome trace, times in microseconds.
    """
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not device:
        return {"idle": "no device was recorded"}
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in device)
    busy, at = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, at))
        at = max(at, end)
    whole = at - spans[0][0]
    times: dict[str, float] = {}
    for event in device:
        name = event["name"].split("<")[0].split("(")[0][-60:]
        times[name] = times.get(name, 0.0) + event["dur"]
    most = sorted(times.items(), key=lambda item: -item[1])[:5]
    return {"idle": f"{1 - busy / whole:.1%}", "most of it": [f"{name} {spent / whole:.1%}" for name, spent in most]}
