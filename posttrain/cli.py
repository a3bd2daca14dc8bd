"""The command line: train, check, show, prepare, plan, fit, blocks, plot, view, chat, eval, merge, push, ...

What they do stands in `tools/commands.py` and `tools/afterwards/commands.py`; here the command line is read.

Only the standard library is imported before a command runs, and only attrs, cattrs and yaml before its
recipe is valid: help and error messages must not wait for torch.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Run as a script, as by `fabric run posttrain/cli.py`. Python put this folder first on the path, where its
    # modules would hide others of the same name; what belongs there is the folder above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

_MODEL = "folder of a run, a model, an adapter or a speculator, or a hub name"
SYNTH_VERBS = ("run", "plan", "status", "errors", "cancel", "export", "view")
EPILOG = """\
on several devices:
  posttrain train recipe.yaml devices=8
  fabric run --accelerator=cuda --devices=8 "$(which posttrain)" train recipe.yaml
  torchrun --standalone --nproc-per-node=8 -m posttrain.cli train recipe.yaml
  srun posttrain train recipe.yaml, or srun torchrun ... (examples/slurm)

exit codes: 0 done, 1 the run failed, 2 the recipe or the command is wrong, 128+n ended by signal n.
POSTTRAIN_TRACEBACK=1 shows where an error was raised."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    import logging

    from posttrain.errors import PosttrainError, RecipeError, RegistryError
    from posttrain.runtime.failures import is_first, is_to_speak
    from posttrain.runtime.launch import hush
    from posttrain.tools import commands
    from posttrain.tools.afterwards import commands as afterwards

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints by itself, and every line would be there twice
    first_rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    hush()
    logging.getLogger("posttrain").setLevel(logging.INFO if first_rank else logging.ERROR)
    try:
        command = getattr(commands, arguments.command, None) or getattr(afterwards, arguments.command)
        return int(command(arguments) or 0)
    except PosttrainError as error:
        if os.environ.get("POSTTRAIN_TRACEBACK") == "1":
            raise
        about_input = isinstance(error, RecipeError | RegistryError)
        # Of most errors, the first is what the rest follows from; but every rank reads the same recipe.
        if is_to_speak(first_rank) if about_input else is_first(error):
            lines = str(error).count("\n") + 1
            complain(f"{lines} problems\n{error}" if isinstance(error, RecipeError) and lines > 1 else str(error))
        return 2 if about_input else 1
    except KeyboardInterrupt:  # outside of the training loop, which saves first
        complain("interrupted")
        return 130
    except BrokenPipeError:  # `posttrain show recipe.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def complain(message: str) -> None:
    """Print an error message."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[1;31merror:\033[0m {message}" if colour else f"error: {message}", file=sys.stderr)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; overrides may stand before, between and after options."""
    parser = argparse.ArgumentParser(
        prog="posttrain", description="Post-training of language models: one recipe, one command.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _recipe_command(commands, "train", "train what a recipe describes, or go on where its run was left",
                    "posttrain train recipe.yaml optimizer.lr=1e-4 max_steps=10k")  # fmt: skip
    checking = _recipe_command(commands, "check", "say all that is wrong with a recipe, without loading anything",
                               "posttrain check recipe.yaml --twin")  # fmt: skip
    checking.add_argument("--twin", action="store_true",
                          help="then try everything out on a tiny copy of the model, on the CPU")  # fmt: skip
    showing = _recipe_command(commands, "show", "print the resolved recipe, or the data as the model will see it",
                              "posttrain show recipe.yaml --data 2")  # fmt: skip
    showing.add_argument("--json", action="store_true", help="as JSON (with --data: one line per document)")
    showing.add_argument("--data", nargs="?", const=3, type=_count, metavar="N",
                         help="the first N documents (3) as tokens: which are supervised, whose they are")  # fmt: skip
    _recipe_command(commands, "prepare", "read, tokenize and cache the data of a recipe ahead of its run",
                    "posttrain prepare recipe.yaml")  # fmt: skip

    planning = _recipe_command(commands, "plan", "estimate the memory that a recipe takes, without weights or a GPU",
                               "posttrain plan recipe.yaml --world 8 strategy=fsdp")  # fmt: skip
    fitting = _recipe_command(commands, "fit", "find the smallest change of a recipe that fits into a device's memory",
                              "posttrain fit recipe.yaml --gpu-memory 24")  # fmt: skip
    for each in (planning, fitting):
        each.add_argument("--world", type=_count, metavar="N", help="devices, all nodes together (the recipe's, or 1)")
        each.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each device (80)")
    fitting.add_argument("--no-offload", action="store_true", help="let nothing wait on the host, which is slow")

    listing = _command(commands, "blocks", "list what a recipe can be made of", "posttrain blocks scheduler cosine")
    listing.add_argument("kind", nargs="?", metavar="KIND", help="such as optimizer")
    listing.add_argument("name", nargs="?", metavar="NAME", help="such as adamw")

    drawing = _command(commands, "plot", "draw the metrics of one run, or compare several",
                       "posttrain plot out/a out/b -o curves.png --metric loss --metric lr")  # fmt: skip
    drawing.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    drawing.add_argument("-o", "--output", type=Path, metavar="FILE", help="picture to write (RUN/curves.png)")
    drawing.add_argument("--metric", action="append", metavar="NAME", help="draw this metric; may be repeated")

    viewing = _command(commands, "view", "make one page of a run: curves, samples, masks, rollouts, recipe",
                       "posttrain view runs/first")  # fmt: skip
    viewing.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    viewing.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (RUN/view.html)")
    viewing.add_argument("--step", type=int, metavar="N", help="of a policy: what it said in this step")

    converting = _command(commands, "convert", "write a recipe of ArcticTraining as one of posttrain",
                          "posttrain convert run-sft.yml -o recipe.yaml")  # fmt: skip
    converting.add_argument("recipe", type=Path, metavar="RECIPE", help="their YAML file")
    converting.add_argument("-o", "--output", type=Path, metavar="FILE", help="ours; printed if not given")

    chatting = _command(commands, "chat", "talk to a model, or have it answer a file of prompts",
                        "posttrain chat runs/first")  # fmt: skip
    chatting.add_argument("model", metavar="MODEL", help=_MODEL)
    chatting.add_argument("--prompts", type=Path, metavar="FILE", help="answer these: chats, prompts, lines of a .txt")
    chatting.add_argument("-o", "--output", type=Path, metavar="FILE", help="with --prompts: a .jsonl file to write")
    chatting.add_argument("--system", metavar="TEXT", help="said before each conversation")
    chatting.add_argument("--max-new-tokens", type=_count, default=512, metavar="N", help="of each reply (512)")
    chatting.add_argument("--temperature", type=float, metavar="T",
                          help="0 takes the likeliest token; what the model's generation_config.json says")  # fmt: skip
    _device(chatting)

    measuring = _command(commands, "eval", "count right replies on rows of your own, and compare models on them",
                         "posttrain eval base-model runs/first --data held.jsonl --check number")  # fmt: skip
    measuring.add_argument("models", nargs="+", metavar="MODEL", help=f"{_MODEL}; compared with the first one")
    what = measuring.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="FILE", help="chats that end with the right reply")
    what.add_argument("--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, such as gsm8k,hellaswag")
    measuring.add_argument("--check", default="exact", metavar="NAME",
                           help="exact, number, math, code, json_schema, or one of your --code (exact)")  # fmt: skip
    measuring.add_argument("--wanted", metavar="COLUMN", help="another column with the right answer, tests or schema")
    measuring.add_argument("--code", type=Path, metavar="FILE", help="Python with a @verifier of your own")
    measuring.add_argument("--rows", type=_count, metavar="N", help="only the first N rows")
    measuring.add_argument("--system", metavar="TEXT", help="said before each prompt")
    measuring.add_argument("--max-new-tokens", type=_count, default=256, metavar="N", help="of each reply (256)")
    measuring.add_argument("--shots", type=int, metavar="N", help="with --tasks: examples in each prompt")
    measuring.add_argument("--task-folder", type=Path, metavar="FOLDER", help="with --tasks: your own, in its YAML")
    measuring.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="for replies (evals in RUN, or here)")
    _device(measuring)
    measuring.set_defaults(command="measure")

    merging = _command(commands, "merge", "make one model of an adapter and its base, and prove that it is the same",
                       "posttrain merge runs/lora -o runs/lora/merged")  # fmt: skip
    merging.add_argument("run", metavar="RUN", help="folder of a run with model.lora, or of an adapter")
    merging.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="for the model (RUN/merged)")
    merging.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the files (that of the base)")

    rounding = _command(commands, "quantize", "make the weights 4 or 8 bits, and say how far the model is from before",
                        "posttrain quantize runs/qat -o runs/qat/int4")  # fmt: skip
    rounding.add_argument("run", metavar="RUN", help="folder of a run, best one with model.qat, or a model")
    rounding.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="for the model (RUN/quantized)")
    rounding.add_argument("--weights", choices=("int4", "int8"), help="of a model that was not trained for it")
    rounding.add_argument("--activations", choices=("int8",), help="with --weights: round what enters layers, too")
    rounding.add_argument("--group-size", type=int, metavar="N", help="with --weights: numbers with one scale (32)")
    rounding.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the rest (as in the files)")

    pushing = _command(commands, "push", "upload what a run has exported to the hub, with a model card",
                       "posttrain push runs/first my-name/my-model --private")  # fmt: skip
    pushing.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    pushing.add_argument("repository", metavar="OWNER/NAME", help="on the hub; made if there is none")
    pushing.add_argument("--private", action="store_true", help="if it is made")
    pushing.add_argument("--revision", metavar="BRANCH", help="a branch; made if there is none")
    pushing.add_argument("--card", action="store_true", help="only print the model card")

    drafting = _command(commands, "accept", "measure how many of a speculator's drafts its base model accepts",
                        "posttrain accept runs/speculator --prompts questions.jsonl")  # fmt: skip
    drafting.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a run of type mlp-speculator")
    drafting.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="chats or prompts, one a line")
    drafting.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="of each reply (64)")
    drafting.add_argument("--drafts", type=_count, metavar="K", help="tokens drafted in a pass (one of each head)")
    drafting.add_argument("-o", "--output", type=Path, metavar="FILE", help="picture to write (RUN/acceptance.png)")

    _command(commands, "doctor", "say what this machine and environment can do, and what not", "posttrain doctor")

    generating = _recipe_command(commands, "synth", "generate data with a model behind an interface, paying once",
                                 "posttrain synth run recipe.yaml --max-cost 5", first="verb")  # fmt: skip
    generating.add_argument("--max-cost", type=float, metavar="DOLLARS", help="run: spend no more, all steps together")
    generating.add_argument("--max-requests", type=int, metavar="N", help="run: refuse to send more")
    generating.add_argument("--retry-failed", action="store_true", help="run: also send what was refused for good")
    generating.add_argument("--first", type=_count, metavar="N",
                            help="run: N rows only; show what is asked and answered, and what all cost")  # fmt: skip
    generating.add_argument("--live", type=Path, metavar="FILE", help="run: write a page (.html) of how it goes")
    generating.add_argument("--no-wait", action="store_true", help="run: submit batches and return")
    generating.add_argument("--dropped", action="store_true", help="export: what was dropped, with the reasons")
    generating.add_argument("-o", "--output", type=Path, metavar="FILE",
                            help="export: a .jsonl or .parquet file; view: the page")  # fmt: skip

    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all("=" in r and not r.startswith("-") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _command(commands: Any, name: str, help_: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(command=name)
    return parser


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, mps, or what there is (auto)")


def _recipe_command(
    commands: Any, name: str, help_: str, example: str, first: str | None = None
) -> argparse.ArgumentParser:
    parser = _command(commands, name, help_, example)
    if first is not None:
        parser.add_argument(first, choices=SYNTH_VERBS, help="what to do")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="sets a key: data.sources.0.split=test")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"how many? expected a number above 0, got {text!r}")
    return int(text)


class _Version(argparse.Action):
    """Look the version up only when it is asked for: importlib.metadata is slow to import."""

    def __init__(self, option_strings: Any, dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from posttrain.runtime.folder import installed

        print(f"posttrain {installed('posttrain') or '(not installed: run from its source folder)'}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
