"""`posttrain doctor`: what this machine and this environment can do, and what is missing for what."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.runtime.folder import installed

if TYPE_CHECKING:
    from rich.table import Table

NEEDED = ("torch", "lightning", "transformers", "tokenizers", "datasets", "attrs", "cattrs", "httpx", "tensorboard")
EXTRAS = {
    "deepspeed": ("deepspeed", "strategy: deepspeed"),
    "peft": ("peft", "model.lora"),
    "liger": ("liger-kernel", "model.liger"),
    "vllm": ("vllm", "synth in process, serving exports"),
    "cortex": ("cryptography", "Snowflake key-pair tokens"),
    "schema": ("jsonschema", "synth: verify by JSON schema"),
    "plot": ("matplotlib", "posttrain plot, posttrain accept"),
    "eval": ("lm_eval", "posttrain eval --tasks"),
    "wandb": ("wandb", "logger: wandb"),
    "mlflow": ("mlflow", "logger: mlflow"),
    "trackio": ("trackio", "logger: trackio"),
    "verifiers": ("verifiers", "environments of that package"),
}
"""Extra -> its package, and what it is for."""
SMALL = 5 * 2**30
"""Free bytes below which a cache of tokenized data is likely to fill the disk."""


def examine() -> "Table":
    """Return what was found, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, found in (*packages(), *devices(), *places()):
        table.add_row(name, Text(found))
    return table


def packages() -> Iterator[tuple[str, str]]:
    """Yield versions, and what is not installed."""
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for package in ("posttrain", *NEEDED):
        yield package, installed(package) or "MISSING: pip install posttrain"
    for extra, (package, purpose) in EXTRAS.items():
        yield package, installed(package) or f"not installed; for {purpose}: pip install 'posttrain[{extra}]'"


def devices() -> Iterator[tuple[str, str]]:
    """Yield processors, GPUs, and what they can be used for."""
    if not importlib.util.find_spec("torch"):
        return
    import torch
    import torch.distributed as dist

    yield "processors", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if about.major >= 8 else "no bf16: set precision to 16-mixed"
        memory = about.total_memory / 2**30
        yield f"gpu {i}", f"{about.name}, {memory:.0f} GiB, capability {about.major}.{about.minor}, {bf16}"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield "gpu", f"none: {built}"
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    yield "ranks talk by", ", ".join(name for name, there in backends.items() if there) or "nothing: one process only"


def places() -> Iterator[tuple[str, str]]:
    """Yield the folders that posttrain and the hub keep things in, and what is wrong with them."""
    from posttrain.values import default_cache

    for name, folder in (("cache", default_cache()), ("hub cache", hub_cache()), ("here", Path.cwd())):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        wrong = "; cannot be written" if not os.access(there, os.W_OK) else "; little room" if free < SMALL else ""
        yield name, f"{folder} ({free / 2**30:,.0f} GiB free{wrong})"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield "hub", "HF_HUB_OFFLINE=1: only what is in the hub cache can be loaded"


def hub_cache() -> Path:
    """Return where models and datasets of the hub are kept."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
