"""The run's folder: whose it is, and what it says about the run beside metrics and checkpoints."""

import fcntl
import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from posttrain import yaml12
from posttrain.errors import CheckpointError, RecipeError
from posttrain.runtime.ours import remove_run

if TYPE_CHECKING:
    from posttrain.interfaces import LoggerBlock
    from posttrain.run import Run

log = logging.getLogger(__name__)

FREE = (
    "output_dir", "code", "resume", "stop_after", "log_every", "eval_every", "logger", "checkpoint", "callbacks",
    "accelerator", "devices", "num_nodes", "strategy", "sequence", "micro_batch_size", "gradient_accumulation_steps",
    "on_nonfinite", "hang_after",
)  # fmt: skip
"""Keys that may differ when a run goes on: they change where and how it runs, not what it computes.
How a step is cut is among them; that its rows stay the same is checked when a checkpoint is loaded."""

OURS = (
    "metrics.jsonl", "recipe.yaml", "failure.txt", "failure-rank-*.txt", "failure-rows*.jsonl", "skipped-rows*.jsonl",
    "rollouts*.jsonl", "evaluations*.jsonl", "samples.jsonl",
)  # fmt: skip
"""Files that a new start removes."""
ADVICE = "give another output_dir, go on all the same with resume=force, or start over with resume=never"
VERSIONS = "versions.json"
PACKAGES = ("posttrain", "torch", "lightning", "transformers", "tokenizers", "datasets", "peft", "deepspeed")


@contextmanager
def claimed(run: "Run", resume: str) -> Iterator[None]:
    """Make the folder this run's while it lasts, or refuse the folder of another; `run.output_dir` exists meanwhile.

    Raises:
        CheckpointError: it holds a run of another recipe, another process trains in it, or it cannot be written.
    """
    with ExitStack() as stack:
        problem = _claim(run, resume, stack) if run.fabric.is_global_zero else None
        if problem := run.fabric.broadcast(problem):
            raise CheckpointError(problem)
        try:
            yield
        finally:
            if run.fabric.is_global_zero:
                with suppress(OSError):  # the run has its own end; what became of a stream's rows is known only now
                    _write(run.output_dir / "ledger.json", json.dumps(run.loaders.ledger, indent=1))


@contextmanager
def logged(run: "Run", blocks: "list[LoggerBlock]") -> Iterator[None]:
    """Open the loggers on rank zero for the time of the run, and close them with how it ended."""
    try:
        if run.fabric.is_global_zero:
            for block in blocks:
                run.loggers.append(block.build(run))
        yield
    except BaseException:
        run.status = "failed"
        raise
    finally:
        for logger in run.loggers:
            logger.finalize(run.status)


def difference(old: Any, new: Any, key: str = "") -> list[str]:
    """Return a line for each key whose value differs, as JSON would tell them apart.

    A key that the old one does not have, and the new one leaves empty, has come with a later version: no difference.
    """
    old, new = (old, new) if key else json.loads(json.dumps([old, new]))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if (key or k not in FREE) and (k in old or new[k])]
        return [line for k in keys for line in difference(old.get(k), new.get(k), f"{key}.{k}" if key else str(k))]
    return [] if old == new else [f"{key}: {json.dumps(old)} there, {json.dumps(new)} here"]


def _claim(run: "Run", resume: str, stack: ExitStack) -> str | None:
    folder = run.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if problem := _locked(folder, stack.enter_context((folder / ".lock").open("a+"))):
            return problem
        saved = folder / "recipe.yaml"
        if saved.exists() and not (folder / VERSIONS).exists():
            return f"{saved} was not written by a run, and would be overwritten: give another output_dir"
        if resume == "never" and saved.exists():
            remove_run(folder, OURS)
        if resume != "never" and saved.exists():
            run.recipe_before = recipe_of(folder)
            differs = difference(run.recipe_before, run.recipe)
            if differs and resume != "force":
                return f"{folder} holds a run of another recipe:\n  " + "\n  ".join(differs) + f"\n{ADVICE}"
        apart = getattr(run.model.module, "apart", None)  # which a network of your own need not know
        found = {**versions(), **({"documents kept apart by": apart} if apart else {})}
        _write(folder / VERSIONS, json.dumps(found, indent=1))  # first: it tells our recipe from others
        _write(saved, yaml12.write(run.recipe))
        _write(folder / "ledger.json", json.dumps(run.loaders.ledger, indent=1))
    except OSError as error:
        return f"the run's folder {folder} cannot be written: {error.strerror or error}; give another output_dir"
    except (RecipeError, UnicodeDecodeError):
        return f"{folder}/recipe.yaml is damaged; give another output_dir, or start over with resume=never"
    return None


def recipe_of(run: Path) -> dict[str, Any]:
    """Return the recipe that a run has written into its folder, as plain data.

    Raises:
        RecipeError: there is none, or it is damaged.
    """
    file = run / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{run} holds no recipe.yaml: give the folder of a run")
    found: dict[str, Any] = yaml12.parse(file.read_text(encoding="utf-8"), lambda line: (line, f"{file}:{line}")).data
    return found


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(f"{file.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _locked(folder: Path, lock: TextIO) -> str | None:
    """Lock a file until it is closed or the process dies, or return who has locked it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return (
            f"{folder} is in use by another run ({lock.read()}); give another output_dir, or if that run is dead and "
            f"the file system has not noticed, remove {lock.name}"
        )
    except OSError as error:  # a file system without locks
        log.info("%s cannot be locked (%s): start no other run in this folder", folder, error.strerror)
        return None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a run depends on."""
    found = {package: made for package in PACKAGES if (made := installed(package))}
    return {"python": sys.version.split()[0], "platform": platform.platform(), **found}


def installed(package: str) -> str | None:
    """Return the version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
