"""The commands of the command line, one function each: arguments in, an exit code or nothing out.

Each imports what it needs when it runs, so that one that needs no torch does not wait for it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posttrain

if TYPE_CHECKING:
    from posttrain.trainer import Trainer


def train(arguments: argparse.Namespace) -> int:
    """Train; a run that a signal ended says so by its exit code, as shells expect."""
    from posttrain.runtime.launch import ranks_to_start, relaunch

    trainer = trainer_of(arguments)
    ranks = ranks_to_start(trainer.accelerator, trainer.devices, trainer.num_nodes)
    if ranks > 1:
        return relaunch(
            ranks, Path(posttrain.__file__).with_name("cli.py"), ["train", str(arguments.recipe), *arguments.overrides]
        )
    run = trainer.train()
    return 128 + run.signal if run.signal else 0


def check(arguments: argparse.Namespace) -> int:
    """Validate a recipe and say in short what it describes; with --twin also try it out, exit code 1 if that fails."""
    from posttrain.values import as_data
    from posttrain.words import counted

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
    say(f"{arguments.recipe}: valid\n" + "\n".join(f"  {name:<10} {text}" for name, text in facts.items()))
    return _twin(arguments) if arguments.twin else 0


def _twin(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from posttrain.tools.proofs import prove, table

    results: list[Any] = []
    with Live(table(results), console=Console()) as live:
        for result in prove(arguments.recipe, arguments.overrides):
            results.append(result)
            live.update(table(results))
    return int(any(result.passed is False for result in results))


def show(arguments: argparse.Namespace) -> None:
    """Print the resolved recipe, or with --data the first documents as tokens."""
    import json

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
            found = [
                {"text": text, "supervised": bool(trained), "role": role} for text, trained, role in preview.tokens
            ]
            side = {"side": preview.side} if preview.side else {}
            say(json.dumps({"source": preview.source, **side, "tokens": found}))
    elif arguments.json:
        say(json.dumps(as_data(trainer), indent=2))
    elif console.is_terminal:
        console.print(Syntax(dump(trainer).rstrip(), "yaml", theme="ansi_dark", background_color="default"))
    else:
        say(dump(trainer).rstrip())
    return None


def prepare(arguments: argparse.Namespace) -> None:
    """Do the data work of a run ahead of it, and print what became of the rows."""
    from rich.console import Console

    from posttrain.blocks.loggers.ledger import ledger

    Console().print(ledger(trainer_of(arguments).prepare()))


def blocks(arguments: argparse.Namespace) -> None:
    """List kinds, blocks of a kind, or the fields of a block."""
    from posttrain.recipes.explain import explain

    say(explain(arguments.kind, arguments.name))


def plot(arguments: argparse.Namespace) -> None:
    """Draw the metrics of runs."""
    from posttrain.tools.plot import curves

    first: Path = arguments.runs[0]
    target = arguments.output or (first if first.is_dir() else first.parent) / "curves.png"
    curves(arguments.runs, arguments.metric, target)
    say(str(target))


def view(arguments: argparse.Namespace) -> None:
    """Write the page of a run."""
    from posttrain.tools.afterwards.view import write

    target = arguments.output or arguments.run / "view.html"
    write(arguments.run, target, arguments.step)
    say(str(target))


def plan(arguments: argparse.Namespace) -> int:
    """Print what a recipe takes of each device's memory; exit code 1 if that is more than there is."""
    from rich.console import Console

    from posttrain.tools.plan import estimate, gib, remedies, table

    trainer, console = trainer_of(arguments), Console()
    devices = trainer.devices if isinstance(trainer.devices, int) else 1
    world = arguments.world or devices * trainer.num_nodes
    found = estimate(trainer, world)
    say(f"{found.trained:,} parameters are trained, {found.frozen:,} are frozen")
    say("".join(f"  {group}\n" for group in found.groups).rstrip())
    console.print(table(found, world))
    say(
        f"{found.operations / 1e12:,.3g} TFLOP for a full micro-batch of {found.tokens:,} tokens, "
        f"{found.operations / found.tokens / 1e9:,.3g} GFLOP for each (matrix products and attention)"
    )
    if trainer.accelerator == "cpu":
        say("a process on a CPU needs about 0.1 GiB more for the libraries and for what they keep for later")
    if found.total <= arguments.gpu_memory * 2**30:
        say(f"fits into {arguments.gpu_memory:g} GiB; leave a tenth for the allocator and the libraries")
        return 0
    say(f"does not fit into {arguments.gpu_memory:g} GiB. With a change:")
    for label, changed in remedies(trainer, world, found):
        say(f"  {gib(changed.total):>9} GiB  {label}")
    return 1


def fit(arguments: argparse.Namespace) -> int:
    """Print the smallest change of a recipe that fits, as overrides; exit code 1 if none does."""
    from rich.console import Console

    from posttrain.tools.fit import fit
    from posttrain.tools.plan import gib, table

    room = arguments.gpu_memory * 2**30
    found = fit(arguments.recipe, arguments.overrides, arguments.world, room, not arguments.no_offload, tell=say)
    if found is None:
        say(
            f"nothing that was tried fits into {arguments.gpu_memory:g} GiB: take more devices (--world) or less length"
        )
        return 1
    Console().print(table(found.estimate, found.world))
    if not found.changes:
        say(f"fits into {arguments.gpu_memory:g} GiB as it is")
        return 0
    say(f"{gib(found.before.total)} GiB before; with these changes it fits into {arguments.gpu_memory:g} GiB:")
    for change in found.changes:
        say(f"  {' '.join(change.shown):<60}  {change.why}")
    texts = " ".join(text for change in found.changes for text in change.shown)
    say(f"posttrain train {arguments.recipe} {' '.join([*arguments.overrides, texts])}")
    return 0


def convert(arguments: argparse.Namespace) -> None:
    """Write a recipe of ArcticTraining as one of ours."""
    from posttrain.recipes.convert import convert
    from posttrain.words import counted

    text, notes = convert(arguments.recipe)
    if arguments.output is None:
        say(text.rstrip())
    else:
        arguments.output.write_text(text, encoding="utf-8")
        say(
            "\n".join(
                [f"{arguments.output}: {counted(len(notes), 'note')} at its head", *(f"  {note}" for note in notes)]
            )
        )


def accept(arguments: argparse.Namespace) -> None:
    """Measure how well the speculator of a run drafts, and draw it."""
    from rich.console import Console

    from posttrain.tools.afterwards.accept import measure

    found = measure(arguments.run_folder, arguments.prompts, arguments.max_new_tokens, arguments.drafts)
    Console().print(found.table())
    say(found.summary)
    target = arguments.output or arguments.run_folder / "acceptance.png"
    found.draw(target)
    say(str(target))


def chat(arguments: argparse.Namespace) -> None:
    """Talk to a model, or have it answer a file."""
    from posttrain.blocks.models.exports import open_model
    from posttrain.errors import RecipeError
    from posttrain.tools.afterwards.chat import Talk, answer, talk
    from posttrain.words import counted

    if arguments.output and not arguments.prompts:
        raise RecipeError("-o is for what --prompts is answered with")
    opened = open_model(arguments.model, arguments.device)
    conversation = Talk(opened, arguments.system, arguments.max_new_tokens, arguments.temperature)
    if not arguments.prompts:
        return talk(conversation)
    count = answer(conversation, arguments.prompts, arguments.output)
    if arguments.output:
        say(f"{arguments.output}: {counted(count, 'conversation')}")
    return None


def measure(arguments: argparse.Namespace) -> None:
    """Count right replies, and compare models."""
    from rich.console import Console

    from posttrain.recipes.load import import_file
    from posttrain.tools.afterwards.evaluate import evaluate, sentences, table

    if arguments.tasks:
        _tasks(arguments)
        return
    if arguments.code:
        import_file(arguments.code)
    results = []
    for model in arguments.models:
        results.append(evaluate(
            model, arguments.data, arguments.check, wanted=arguments.wanted, rows=arguments.rows,
            max_new_tokens=arguments.max_new_tokens, system=arguments.system, output_dir=arguments.output,
            device=arguments.device,
        ))  # fmt: skip
    Console().print(table(results))
    for sentence in sentences(results):
        say(sentence)


def _tasks(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from posttrain.tools.afterwards.harness import run_tasks, table

    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    results = [
        run_tasks(
            model, tasks, rows=arguments.rows, shots=arguments.shots, folder=arguments.task_folder,
            output_dir=arguments.output, device=arguments.device,
        )
        for model in arguments.models
    ]  # fmt: skip
    Console().print(table(results))
    for result in results:
        say(f"all of it: {result.file}")


def merge(arguments: argparse.Namespace) -> None:
    """Make one model of an adapter and its base."""
    from posttrain.tools.afterwards.merge import merge
    from posttrain.words import counted

    made = merge(arguments.run, arguments.output or Path(arguments.run) / "merged", arguments.dtype)
    apart, effect = made.apart, made.effect
    say(
        f"{made.folder}: {made.base} with the adapter in its weights.\nLoaded again, its log-probabilities differ from "
        f"those of the adapter on its base by at most {apart.difference:.1e} nats (mean KL {apart.kl:.1e}; "
        f"{counted(made.rows, 'text')}); "
        f"the adapter changes them by up to {effect.difference:.2g} (KL {effect.kl:.1e})."
    )


def quantize(arguments: argparse.Namespace) -> None:
    """Quantize a model."""
    from posttrain.blocks.models.quantized.aware import QAT
    from posttrain.errors import RecipeError
    from posttrain.tools.afterwards.quantize import quantize
    from posttrain.words import counted

    options = {name: getattr(arguments, name) for name in ("weights", "activations", "group_size")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and "weights" not in options:
        raise RecipeError("--activations and --group-size go with --weights")
    folder = arguments.output or Path(arguments.run) / "quantized"
    made = quantize(arguments.run, folder, QAT(**options) if options else None, arguments.dtype)
    before, now = (f"{size / 1e6:,.0f} MB" for size in made.bytes)
    given = "what was trained, which had these numbers" if made.trained else "the model in full precision"
    say(
        f"{made.folder}: {made.qat}, {before if made.bytes[0] else 'files'} -> {now}.\nLoaded again, its "
        f"log-probabilities differ from {given}, by at most {made.apart.difference:.1e} nats "
        f"(mean KL {made.apart.kl:.1e}; {counted(made.rows, 'text')})."
    )


def push(arguments: argparse.Namespace) -> None:
    """Upload an export."""
    from posttrain.tools.afterwards.push import card, push

    if arguments.card:
        say(card(arguments.run, arguments.repository).rstrip())
    else:
        say(push(arguments.run, arguments.repository, arguments.private, arguments.revision))


def doctor(arguments: argparse.Namespace) -> None:
    """Print versions, devices and folders, and what is missing for what."""
    from rich.console import Console

    from posttrain.tools.doctor import examine

    Console().print(examine())


def synth(arguments: argparse.Namespace) -> int:
    """Generate data."""
    from posttrain.synth.commands import main

    return main(arguments)


def trainer_of(arguments: argparse.Namespace) -> "Trainer":
    """Return the trainer of the recipe and overrides that were given."""
    from posttrain.recipes.load import load

    return load(arguments.recipe, arguments.overrides)


def say(text: str) -> None:
    """Print to standard output."""
    print(text)  # noqa: T201


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
    from posttrain.errors import RecipeError

    if not callable(getattr(trainer.data, "preview", None)):
        raise RecipeError(f"data: {type(trainer.data).__name__} has no method preview(), which this command needs")
    return trainer.data.preview(trainer.tokenizer.build(trainer.model), count)  # type: ignore[attr-defined]
