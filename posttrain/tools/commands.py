"""The commands about recipes and this machine, one function each: arguments in, an exit code or nothing out.

Each imports what it needs when it runs, so that one that needs no torch does not wait for it. The commands for what a
run has made stand in `afterwards/commands.py`.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posttrain
from posttrain.errors import RecipeError
from posttrain.words import counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from posttrain.trainer import Trainer


def train(arguments: argparse.Namespace) -> int:
    """Train; a run that a signal ended says so by its exit code, as shells expect."""
    from posttrain.runtime.launch import ranks_to_start, relaunch

    trainer = trainer_of(arguments)
    ranks = ranks_to_start(trainer.accelerator, trainer.devices, trainer.num_nodes)
    if ranks > 1:
        script = Path(posttrain.__file__).with_name("cli.py")
        return relaunch(ranks, script, ["train", str(arguments.recipe), *arguments.overrides])
    run = trainer.train()
    return 128 + run.signal if run.signal else 0


def check(arguments: argparse.Namespace) -> int:
    """Validate a recipe and say in short what it describes; with --twin also try it out, exit code 1 if that fails."""
    from posttrain.values import as_data

    trainer = trainer_of(arguments)
    recipe = as_data(trainer)
    steps, epochs = recipe["max_steps"], recipe["epochs"]
    length = counted(steps, "step") if steps else counted(epochs, "epoch")
    rows, groups = recipe["micro_batch_size"], recipe["gradient_accumulation_steps"]
    cut = f" ({rows} x {groups})" if groups > 1 else ""
    sources = [_name(source) for source in recipe["data"].get("sources", [])]
    facts = {
        "trainer": f"{recipe['type']} ({type(trainer).__name__})",
        "model": _origin(_name(recipe["model"])),
        "data": ", ".join(sources) or recipe["data"].get("type"),
        "length": f"{length}, each step {counted(rows * groups, 'row')}{cut} per device",
        "optimizer": f"{recipe['optimizer'].get('type')}, {recipe['scheduler'].get('type')} schedule",
        "output": recipe["output_dir"],
    }
    if recipe["code"]:
        facts["code"] = f"{', '.join(recipe['code'])} (run when the recipe is read)"
    print(f"{arguments.recipe}: valid\n" + "\n".join(f"  {name:<10} {text}" for name, text in facts.items()))
    return _twin(arguments) if arguments.twin else 0


def _twin(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from posttrain.tools.twin.proofs import prove, table

    results: list[Any] = []
    with Live(table(results), console=Console()) as live:
        for result in prove(arguments.recipe, arguments.overrides):
            results.append(result)
            live.update(table(results))
    return int(any(result.passed is False for result in results))


def show(arguments: argparse.Namespace) -> None:
    """Print the resolved recipe, or with --data the first documents as tokens."""
    from rich.console import Console
    from rich.syntax import Syntax

    from posttrain.recipes.load import dump
    from posttrain.tools.show import tokens
    from posttrain.values import as_data

    trainer, console = trainer_of(arguments), Console()
    if arguments.data is not None:
        previews = _previews(trainer, arguments.data)
        if not arguments.json:
            return tokens(previews, console)
        for preview in previews:
            found = [{"text": text, "supervised": bool(own), "role": role} for text, own, role in preview.tokens]
            side = {"side": preview.side} if preview.side else {}
            print(json.dumps({"source": preview.source, **side, "tokens": found}))
    elif arguments.json:
        print(json.dumps(as_data(trainer), indent=2))
    elif console.is_terminal:
        console.print(Syntax(dump(trainer).rstrip(), "yaml", theme="ansi_dark", background_color="default"))
    else:
        print(dump(trainer).rstrip())
    return None


def prepare(arguments: argparse.Namespace) -> None:
    """Do the data work of a run ahead of it, and print what became of the rows."""
    from posttrain.blocks.loggers.ledger import ledger

    display(ledger(trainer_of(arguments).prepare()))


def blocks(arguments: argparse.Namespace) -> None:
    """List kinds, blocks of a kind, or the fields of a block."""
    from posttrain.recipes.explain import explain

    print(explain(arguments.kind, arguments.name))


def plot(arguments: argparse.Namespace) -> None:
    """Draw the metrics of runs."""
    from posttrain.tools.plot import curves

    first: Path = arguments.runs[0]
    target = arguments.output or (first if first.is_dir() else first.parent) / "curves.png"
    curves(arguments.runs, arguments.metric, target)
    print(target)


def plan(arguments: argparse.Namespace) -> int:
    """Print what a recipe takes of each device's memory; exit code 1 if that is more than there is."""
    from posttrain.tools.plan import estimate, gib, remedies, table

    trainer = trainer_of(arguments)
    devices = trainer.devices if isinstance(trainer.devices, int) else 1
    world = arguments.world or devices * trainer.num_nodes
    found = estimate(trainer, world)
    print(f"{found.trained:,} parameters are trained, {found.frozen:,} are frozen")
    for group in found.groups:
        print(f"  {group}")
    display(table(found, world))
    print(
        f"{found.operations / 1e12:,.3g} TFLOP for a full micro-batch of {found.tokens:,} tokens, "
        f"{found.operations / found.tokens / 1e9:,.3g} GFLOP for each (matrix products and attention)"
    )
    if trainer.accelerator == "cpu":
        print("a process on a CPU needs about 0.1 GiB more for the libraries and for what they keep for later")
    room = f"{arguments.gpu_memory:g} GiB"
    if found.total <= arguments.gpu_memory * 2**30:
        print(f"fits into {room}; leave a tenth for the allocator and the libraries")
        return 0
    print(f"does not fit into {room}. With a change:")
    for label, changed in remedies(trainer, world, found):
        print(f"  {gib(changed.total):>9} GiB  {label}")
    return 1


def fit(arguments: argparse.Namespace) -> int:
    """Print the smallest change of a recipe that fits, as overrides; exit code 1 if none does."""
    from posttrain.tools.fit import fit
    from posttrain.tools.plan import gib, table

    room, most = f"{arguments.gpu_memory:g} GiB", arguments.gpu_memory * 2**30
    found = fit(arguments.recipe, arguments.overrides, arguments.world, most, not arguments.no_offload, tell=print)
    if found is None:
        print(f"nothing that was tried fits into {room}: take more devices (--world) or less length")
        return 1
    display(table(found.estimate, found.world))
    if not found.changes:
        print(f"fits into {room} as it is")
        return 0
    print(f"{gib(found.before.total)} GiB before; with these changes it fits into {room}:")
    for change in found.changes:
        print(f"  {' '.join(change.shown):<60}  {change.why}")
    texts = " ".join(text for change in found.changes for text in change.shown)
    print(f"posttrain train {arguments.recipe} {' '.join([*arguments.overrides, texts])}")
    return 0


def convert(arguments: argparse.Namespace) -> None:
    """Write a recipe of ArcticTraining as one of ours."""
    from posttrain.recipes.convert import convert

    text, notes = convert(arguments.recipe)
    if arguments.output is None:
        print(text.rstrip())
    else:
        arguments.output.write_text(text, encoding="utf-8")
        print(f"{arguments.output}: {counted(len(notes), 'note')} at its head")
        for note in notes:
            print(f"  {note}")


def doctor(arguments: argparse.Namespace) -> None:
    """Print versions, devices and folders, and what is missing for what."""
    from posttrain.tools.doctor import examine

    display(examine())


def synth(arguments: argparse.Namespace) -> int:
    """Generate data."""
    from posttrain.synth.commands import main

    return main(arguments)


def trainer_of(arguments: argparse.Namespace) -> "Trainer":
    """Return the trainer of the recipe and overrides that were given."""
    from posttrain.recipes.load import load

    return load(arguments.recipe, arguments.overrides)


def display(found: "RenderableType") -> None:
    """Print a table, or whatever else rich can."""
    from rich.console import Console

    Console().print(found)


def _name(data: Any) -> str:
    """What to call a model or a source in one line."""
    return str(data.get("name_or_path", data.get("type"))) if isinstance(data, dict) else str(data)


def _origin(name: str) -> str:
    """Return the name of a model; of one that is no folder, that it will be looked for on the hub: it may be a typo."""
    from posttrain.values import expanded, similar_folder

    if expanded(name).exists():
        return name
    return f"{name} (from the hub: there is no such folder here{similar_folder(name)})"


def _previews(trainer: "Trainer", count: int) -> Any:
    if not callable(getattr(trainer.data, "preview", None)):
        raise RecipeError(f"data: {type(trainer.data).__name__} has no method preview(), which this command needs")
    return trainer.data.preview(trainer.tokenizer.build(trainer.model), count)  # type: ignore[attr-defined]
