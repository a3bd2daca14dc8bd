"""`posttrain eval --tasks`: the tasks of lm-evaluation-harness (extra `eval`), as it defines them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.errors import RecipeError
from posttrain.registry import suggest

if TYPE_CHECKING:
    from rich.table import Table


@attrs.frozen
class Measured:
    """What the harness found for a model."""

    model: str
    tasks: dict[str, dict[str, Any]]
    """Task -> its metrics, and their standard errors, by the harness's names: `exact_match,strict-match`."""
    file: Path
    """All that the harness says."""


def run_tasks(
    model: str, tasks: list[str], *, rows: int | None = None, shots: int | None = None, folder: Path | None = None,
    batch_size: int = 8, chat: bool = True, output_dir: Path | None = None, device: str = "auto",
) -> Measured:  # fmt: skip
    """Run tasks of the harness on a model.

    Args:
        model: folder of a run, of a model or an adapter, or a hub name.
        tasks: as `lm_eval ls tasks` names them.
        rows: of each task only the first so many.
        shots: examples in each prompt; what the task says by default.
        folder: with tasks of your own, in the harness's YAML.
        batch_size: requests that are computed together.
        chat: put prompts into the model's chat template, if it has one.
        output_dir: where the results go; by default `evals` in the run's folder, or here.
        device: `cpu`, `cuda`, `mps`, or what there is.

    Raises:
        RecipeError: the harness is not installed, does not know a task, or cannot load its data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f"--tasks needs lm-evaluation-harness: pip install 'posttrain[eval]' ({error})") from None
    from posttrain.blocks.models.exports import export_of, open_model

    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        hint = suggest(unknown[0], manager.all_tasks)
        raise RecipeError(f"--tasks: lm-evaluation-harness has no task {unknown[0]!r}{hint}")
    opened = open_model(model, device)
    network = HFLM(pretrained=opened.hf, tokenizer=opened.tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=network, tasks=tasks, num_fewshot=shots, limit=rows, task_manager=manager, bootstrap_iters=1000,
            apply_chat_template=chat and bool(opened.tokenizer.chat_template), log_samples=False,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise RecipeError(f"--tasks: the data of {', '.join(tasks)} cannot be loaded: {error}") from error
    place = export_of(model)
    work = output_dir or (Path(model) if place != model else Path()) / "evals"
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"lm-eval-{'-'.join(tasks)[:80]}.json"
    file.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return Measured(model, found["results"], file)


def table(results: list[Measured]) -> "Table":
    """Return results for the terminal: a line for each metric of each task, a column for each model."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric"):
        made.add_column(name, overflow="fold")
    for result in results:
        made.add_column(f"{result.model} ± s.e.", justify="right", overflow="fold")
    for task, metrics in results[0].tasks.items():
        for name, value in metrics.items():
            if not isinstance(value, int | float) or "_stderr" in name or name == "sample_len":
                continue
            cells = [f"{r.tasks[task][name]:.4f} ± {_error(r.tasks[task], name)}" for r in results]
            made.add_row(Text(task), name.removesuffix(",none"), *cells)
    return made


def _error(metrics: dict[str, Any], name: str) -> str:
    metric, _, kind = name.partition(",")
    found = metrics.get(f"{metric}_stderr,{kind}")
    return f"{found:.4f}" if isinstance(found, int | float) else "?"
