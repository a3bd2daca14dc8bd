"""The command line: `posttrain train | check | show | prepare | blocks | plot`.

Nothing heavy is imported before a recipe has been found to be right.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and Path(sys.path[0]) == Path(__file__).parent:  # `fabric run posttrain/cli.py`
    sys.path[0] = str(Path(__file__).parent.parent)

from posttrain.errors import PosttrainError, RecipeError, RegistryError

EXAMPLES = {
    "train": "posttrain train sft.yaml optimizer.lr=1e-4 output_dir=runs/second",
    "check": "posttrain check sft.yaml max_steps=100",
    "show": "posttrain show sft.yaml --data 3",
    "prepare": "posttrain prepare sft.yaml",
    "blocks": "posttrain blocks optimizer adamw",
    "plot": "posttrain plot runs/first runs/second -o both.png",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 1 for a run that failed, 2 for a wrong recipe or usage."""
    chosen = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("posttrain").setLevel(logging.INFO)
    try:
        return int(chosen.run(chosen) or 0)
    except PosttrainError as error:
        if os.environ.get("POSTTRAIN_TRACEBACK"):
            raise
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}error{plain}: {error}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, RecipeError | RegistryError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `posttrain show recipe.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    whole = argparse.ArgumentParser(prog="posttrain", description="Post-training for language models.")
    whole.add_argument("--version", action="version", version=_version())
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, epilog=f"example: {EXAMPLES[name]}")
        made.set_defaults(run=run)
        return made

    def takes_recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument("recipe", help="a YAML file")
        made.add_argument(
            "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as optimizer.lr=1e-4"
        )

    takes_recipe(command("train", train, "Train from a recipe, or go on where its run was interrupted."))
    takes_recipe(command("check", check, "Say everything that is wrong with a recipe, without loading anything heavy."))
    shown = command("show", show, "Print the resolved recipe, or with --data what its data looks like to the model.")
    takes_recipe(shown)
    shown.add_argument("--json", action="store_true", help="as JSON")
    shown.add_argument(
        "--data", nargs="?", type=int, const=3, metavar="N", help="the first N rows of each source, as tokens"
    )
    takes_recipe(command("prepare", prepare, "Tokenize a recipe's data ahead of a run, into the cache."))
    listed = command("blocks", blocks, "List the blocks that a recipe can name, or explain one of them.")
    listed.add_argument("kind", nargs="?", help="trainer, model, data, optimizer, ...")
    listed.add_argument("name", nargs="?", help="as in `type: NAME`")
    plot_ = command("plot", plot, "Draw the curves of one or several runs.")
    plot_.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    plot_.add_argument("-o", "--output", type=Path, help="a PNG file; RUN/curves.png by default")
    plot_.add_argument("--metric", action="append", help="draw this metric (may be given several times)")
    return whole


def train(chosen: argparse.Namespace) -> int:
    """Train; an interrupted run exits with 128 plus the signal's number, as shells expect."""
    run = _load(chosen).train()
    return 128 + run.signal if run.signal else 0


def check(chosen: argparse.Namespace) -> None:
    """Validate a recipe and say what it would do."""
    from posttrain.values import as_data

    data = as_data(_load(chosen))
    rows = data["micro_batch_size"] * data["gradient_accumulation_steps"]
    steps = f"{data['max_steps']} steps" if data["max_steps"] else f"{data['epochs']} pass(es) over the data"
    _print(f"{chosen.recipe} is a valid {data['type']} recipe")
    _print(f"  model      {data['model'].get('name_or_path', data['model']['type'])}")
    for source in data["data"].get("sources", []):
        _print(f"  data       {source.get('name_or_path', source) if isinstance(source, dict) else source}")
    how = f"{data['optimizer']['type']}, {data['scheduler']['type']}"
    _print(f"  training   {steps}, {rows} rows per device and step, {how}")
    _print(f"  folder     {data['output_dir']}")


def show(chosen: argparse.Namespace) -> None:
    """Print a recipe, or rows of its data."""
    from rich.console import Console

    trainer = _load(chosen)
    if chosen.data is not None:
        from posttrain import show as pictures

        previews = trainer.data.preview(trainer.tokenizer.build(trainer.model), chosen.data)
        if not chosen.json:
            return pictures.tokens(previews, Console())
        for preview in previews:
            _print(json.dumps({"source": preview.source, "tokens": preview.tokens}, ensure_ascii=False))
        return None
    if chosen.json:
        from posttrain.values import as_data

        return _print(json.dumps(as_data(trainer), indent=2))
    from posttrain.recipe import dump

    text = dump(trainer)
    if not sys.stdout.isatty():
        return _print(text.rstrip())
    from rich.syntax import Syntax

    return Console().print(Syntax(text.rstrip(), "yaml", background_color="default"))


def prepare(chosen: argparse.Namespace) -> None:
    """Do the data work of a recipe."""
    from rich.console import Console

    from posttrain import show as pictures
    from posttrain.interfaces import Preparable

    trainer = _load(chosen)
    if not isinstance(trainer.data, Preparable):
        raise RecipeError(f"data of type {type(trainer.data).__name__} has nothing to prepare")
    prepared = trainer.data.prepare(trainer.tokenizer.build(trainer.model))
    Console().print(pictures.ledger(prepared.ledger))


def blocks(chosen: argparse.Namespace) -> None:
    """Explain blocks."""
    from posttrain.explain import explain

    _print(explain(chosen.kind, chosen.name))


def plot(chosen: argparse.Namespace) -> None:
    """Draw curves."""
    from posttrain import show as pictures

    target = chosen.output or (chosen.runs[0] / "curves.png" if chosen.runs[0].is_dir() else Path("curves.png"))
    pictures.curves(chosen.runs, chosen.metric, target)
    _print(str(target))


def _load(chosen: argparse.Namespace) -> Any:
    from posttrain.recipe import load

    return load(chosen.recipe, chosen.overrides)


def _print(text: str) -> None:
    print(text)  # noqa: T201


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("posttrain")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
