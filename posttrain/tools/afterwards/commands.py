"""The commands for what a run has made, one function each; like `posttrain.tools.commands`, they import late."""

import argparse
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.tools.commands import display
from posttrain.words import counted


def view(arguments: argparse.Namespace) -> None:
    """Write the page of a run."""
    from posttrain.tools.afterwards.view import write

    target = arguments.output or arguments.run / "view.html"
    write(arguments.run, target, arguments.step)
    print(target)


def accept(arguments: argparse.Namespace) -> None:
    """Measure how well the speculator of a run drafts, and draw it."""
    from posttrain.tools.afterwards.accept import measure

    found = measure(arguments.run_folder, arguments.prompts, arguments.max_new_tokens, arguments.drafts)
    display(found.table())
    print(found.summary)
    target = arguments.output or arguments.run_folder / "acceptance.png"
    found.draw(target)
    print(target)


def chat(arguments: argparse.Namespace) -> None:
    """Talk to a model, or have it answer a file."""
    if arguments.output and not arguments.prompts:
        raise RecipeError("-o is for what --prompts is answered with")
    from posttrain.blocks.models.exports import open_model
    from posttrain.tools.afterwards.chat import Talk, answer, talk

    opened = open_model(arguments.model, arguments.device)
    conversation = Talk(opened, arguments.system, arguments.max_new_tokens, arguments.temperature)
    if not arguments.prompts:
        return talk(conversation)
    count = answer(conversation, arguments.prompts, arguments.output)
    if arguments.output:
        print(f"{arguments.output}: {counted(count, 'conversation')}")
    return None


def measure(arguments: argparse.Namespace) -> None:
    """Count right replies, and compare models."""
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
    display(table(results))
    for sentence in sentences(results):
        print(sentence)


def _tasks(arguments: argparse.Namespace) -> None:
    from posttrain.tools.afterwards.harness import run_tasks, table

    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    results = [
        run_tasks(
            model, tasks, rows=arguments.rows, shots=arguments.shots, folder=arguments.task_folder,
            output_dir=arguments.output, device=arguments.device,
        )
        for model in arguments.models
    ]  # fmt: skip
    display(table(results))
    for result in results:
        print(f"all of it: {result.file}")


def merge(arguments: argparse.Namespace) -> None:
    """Make one model of an adapter and its base."""
    from posttrain.tools.afterwards.merge import merge

    made = merge(arguments.run, arguments.output or Path(arguments.run) / "merged", arguments.dtype)
    apart, effect = made.apart, made.effect
    print(
        f"{made.folder}: {made.base} with the adapter in its weights.\nLoaded again, its log-probabilities differ from "
        f"those of the adapter on its base by at most {apart.difference:.1e} nats (mean KL {apart.kl:.1e}; "
        f"{counted(made.rows, 'text')}); "
        f"the adapter changes them by up to {effect.difference:.2g} (KL {effect.kl:.1e})."
    )


def quantize(arguments: argparse.Namespace) -> None:
    """Quantize a model."""
    from posttrain.blocks.models.quantized.aware import QAT
    from posttrain.tools.afterwards.quantize import quantize

    options = {name: getattr(arguments, name) for name in ("weights", "activations", "group_size")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and "weights" not in options:
        raise RecipeError("--activations and --group-size go with --weights")
    folder = arguments.output or Path(arguments.run) / "quantized"
    made = quantize(arguments.run, folder, QAT(**options) if options else None, arguments.dtype)
    before, now = (f"{size / 1e6:,.0f} MB" for size in made.bytes)
    given = "what was trained, which had these numbers" if made.trained else "the model in full precision"
    print(
        f"{made.folder}: {made.qat}, {before if made.bytes[0] else 'files'} -> {now}.\nLoaded again, its "
        f"log-probabilities differ from {given}, by at most {made.apart.difference:.1e} nats "
        f"(mean KL {made.apart.kl:.1e}; {counted(made.rows, 'text')})."
    )


def push(arguments: argparse.Namespace) -> None:
    """Upload an export."""
    from posttrain.tools.afterwards.push import card, push

    if arguments.card:
        print(card(arguments.run, arguments.repository).rstrip())
    else:
        print(push(arguments.run, arguments.repository, arguments.private, arguments.revision))
