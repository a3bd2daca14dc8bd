"""`posttrain push`: a run's export on the Hugging Face hub, with a model card made of what the run has written down."""

import json
from pathlib import Path
from typing import Any

from posttrain import yaml12
from posttrain.errors import CheckpointError, PosttrainError, RecipeError
from posttrain.runtime.folder import recipe_of
from posttrain.tools import plot
from posttrain.tools.afterwards.evaluate import summaries

CARD = "README.md"
WAYS = {"mlp-speculator": "text-generation", "reward": "text-classification"}


def push(run: Path, repository: str, private: bool, revision: str | None = None) -> str:
    """Upload the export of a run; returns the address of the commit.

    The hub and the token are huggingface_hub's own: $HF_ENDPOINT, and $HF_TOKEN or `hf auth login`.

    Args:
        run: its folder.
        repository: `owner/name` on the hub; made if there is none.
        private: of a repository that is made.
        revision: a branch, made if there is none.

    Raises:
        RecipeError: the run has exported no model.
        CheckpointError: the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from posttrain.blocks.models.exports import export_of
    from posttrain.runtime.ours import LIST

    folder = Path(export_of(str(run)))
    if not folder.is_dir():
        raise RecipeError(f"{run} is no folder of a run")
    api = HfApi(library_name="posttrain")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if not (folder / CARD).exists():
            text = card(run, repository).encode()
            api.upload_file(path_or_fileobj=text, path_in_repo=CARD, repo_id=repository, revision=revision)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, ignore_patterns=[LIST, "step-*"],
            commit_message=f"posttrain: {run.name}",
        )  # fmt: skip
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder} could not be uploaded to {repository}: {_first_line(error)}") from error
    return str(done)


def card(run: Path, repository: str) -> str:
    """Return a model card in Markdown: what was trained, on what, with which result, and by which recipe.

    Raises:
        RecipeError: the folder holds no run.
    """
    recipe = recipe_of(run)
    base, kind = str(recipe["model"].get("name_or_path", "")), str(recipe["type"])
    hub = {"base_model": base} if base and not Path(base).exists() and not recipe["model"].get("random_init") else {}
    adapter = bool(recipe["model"].get("lora"))
    head = {
        **hub, "library_name": "peft" if adapter else "transformers", "pipeline_tag": WAYS.get(kind, "text-generation"),
        "tags": ["posttrain", kind, *(["lora"] if adapter else [])],
    }  # fmt: skip
    parts = [
        f"---\n{yaml12.write(head)}---\n# {repository.rpartition('/')[2]}",
        f"{_shown(base)}, trained with posttrain by `type: {kind}`.",
        *_data(run), *_results(run), *_evals(run),
        f"## Recipe\n\n```yaml\n{_without_keys(recipe)}```",
        *_versions(run),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _data(run: Path) -> list[str]:
    lines = []
    for name, source in _json(run / "ledger.json").get("sources", {}).items():
        counts = [(key, source.get(key)) for key in ("rows_in", "dropped", "documents", "pairs", "tokens")]
        numbers = (f"{_total(n):,} {key.replace('_', ' ')}" for key, n in counts if n)
        lines.append(f"| {_shown(name)} | {', '.join(numbers)} |")
    return ["## Data\n\n| source | rows |\n|---|---|\n" + "\n".join(lines)] if lines else []


def _total(count: Any) -> int:
    """Return a number of the ledger; rows that were dropped are there by reason."""
    if isinstance(count, dict):
        return sum(_total(n["count"] if isinstance(n, dict) else n) for n in count.values())
    return int(count)


def _results(run: Path) -> list[str]:
    try:
        curves = plot.read(run)
    except PosttrainError:  # it logged none
        return []
    last = {"step": max(steps[-1] for steps, _ in curves.values())} | {name: y[-1] for name, (_, y) in curves.items()}
    wanted = [name for name in last if name in ("step", "loss", "epoch", "tokens") or name.startswith("eval_")]
    rows = "\n".join(f"| {name} | {last[name]:,.6g} |" for name in wanted)
    return [f"## Results\n\n| metric | last value |\n|---|---|\n{rows}"]


def _evals(run: Path) -> list[str]:
    rows = [
        f"| {_shown(said['data'])} | {said['check']} | {said['right']:.1%} "
        f"[{said['interval_95'][0]:.1%}, {said['interval_95'][1]:.1%}] | {said['rows']:,} |"
        for said in summaries(run)
    ]  # fmt: skip
    head = "## Right replies (`posttrain eval`)\n\n| data | check | right, 95 % interval | rows |\n|---|---|---|---|\n"
    return [head + "\n".join(rows)] if rows else []


def _versions(run: Path) -> list[str]:
    file = run / "versions.json"
    said = ", ".join(f"{name} {value}" for name, value in _json(file).items() if name not in ("platform",))
    return [f"Made with {said}."] if said else []


def _without_keys(recipe: dict[str, Any]) -> str:
    """Return a recipe as YAML, with folders of this machine by their names alone."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [cleaned(inner) for inner in value]
        return _shown(value) if isinstance(value, str) else value

    return yaml12.write(cleaned(recipe))


def _shown(name: str) -> str:
    """Return a path of this machine without the folders above it; who lives there is nobody's business."""
    return Path(name).name if name.startswith(("/", "~")) else name


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
