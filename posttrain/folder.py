"""The run's folder: whose it is, and what it says about the run beside metrics and checkpoints."""

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from posttrain import yaml12
from posttrain.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from posttrain.interfaces import LoggerBlock
    from posttrain.run import Run

FREE = (
    "output_dir", "code", "resume", "stop_after", "log_every", "eval_every", "logger", "checkpoint", "callbacks",
    "accelerator", "devices", "num_nodes", "strategy", "sequence", "micro_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
"""Keys that may differ when a run goes on: they change where and how it runs, not what it computes.
How a step is cut is among them; that its rows stay the same is checked when a checkpoint is loaded."""

PACKAGES = ("posttrain", "torch", "lightning", "transformers", "tokenizers", "datasets", "peft", "deepspeed")


def claim(run: "Run", resume: str) -> None:
    """Make the folder this run's, or refuse the folder of another; `run.output_dir` exists afterwards.

    Raises:
        CheckpointError: it holds a run of another recipe, or cannot be written.
    """
    problem = _claim(run, resume) if run.fabric.is_global_zero else None
    problem = run.fabric.broadcast(problem)
    if problem:
        raise CheckpointError(problem)


@contextmanager
def logged(run: "Run", blocks: "list[LoggerBlock]") -> Iterator[None]:
    """Open the loggers on rank zero for the time of the run, and close them with how it ended."""
    if run.fabric.is_global_zero:
        run.loggers = [block.build(run) for block in blocks]
    try:
        yield
    except BaseException:
        run.status = "failed"
        raise
    finally:
        for logger in run.loggers:
            logger.finalize(run.status)


def difference(old: Any, new: Any, key: str = "") -> list[str]:
    """Return a line for each key whose value differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if key or k not in FREE]
        return [line for k in keys for line in difference(old.get(k), new.get(k), f"{key}.{k}" if key else str(k))]
    return [] if old == new else [f"{key}: {json.dumps(old)} there, {json.dumps(new)} here"]


def _claim(run: "Run", resume: str) -> str | None:
    folder = run.output_dir
    try:
        if resume == "never":
            _clear(run)
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "recipe.yaml"
        if resume == "auto" and saved.exists():
            there = yaml12.parse(saved.read_text(encoding="utf-8"), lambda line: (line, f"{saved}:{line}")).data
            differs = difference(there, json.loads(json.dumps(run.recipe)))
            if differs:
                return (
                    f"{folder} holds a run of another recipe:\n  " + "\n  ".join(differs) + "\n"
                    "give another output_dir, go on all the same with resume=force, or start anew with resume=never"
                )
        saved.write_text(yaml12.write(run.recipe), encoding="utf-8")
        (folder / "versions.json").write_text(json.dumps(versions(), indent=1))
        (folder / "ledger.json").write_text(json.dumps(run.loaders.ledger, indent=1))
    except OSError as error:
        return f"the run's folder {folder} cannot be written: {error.strerror or error}; give another output_dir"
    except (RecipeError, UnicodeDecodeError):
        return f"{folder}/recipe.yaml is damaged; give another output_dir, or start anew with resume=never"
    return None


def _clear(run: "Run") -> None:
    """Remove what an earlier run left here, and nothing else."""
    folder = run.output_dir
    if not (folder / "recipe.yaml").exists():
        return
    for found in (*folder.glob("step-*"), folder / "tensorboard", folder / "huggingface", folder / "refresh"):
        shutil.rmtree(found, ignore_errors=True)
    for name in ("metrics.jsonl", "recipe.yaml"):
        (folder / name).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a run depends on."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
