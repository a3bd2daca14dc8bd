"""Peak memory of training beside what `posttrain plan` says: full, adapters, a base of 4 bits, optimizers with less state.

    python benchmarks/memory.py --model FOLDER --data gsm8k_train.jsonl [--only qlora] [--steps 6] [--trl]
    python benchmarks/memory.py --model FOLDER --data ... --held ... --steps 40 --curves docs/img/adapters.png
    python benchmarks/memory.py --table        # what fits on 24, 48 and 80 GB, for shapes of known models

Every setting runs in processes of its own, on a CPU with one thread, on the same rows in the same order. "tensors" is what
a plan is about: the most bytes that torch's allocator had handed out at once (tests/support/allocated.py), in two steps on the same
texts with every token trained, since a plan is of micro-batches as full as can be. "process" is the most memory of the
process while it trains as the recipe says (Linux's VmHWM), above what it has after its imports. For both, parameters are
copied out of their files first, as moving them to a GPU would do. Tokens are per CPU second, evaluations aside.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system, and is not counted
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

LORA, LOW = {"lora": {"r": 16}}, {"dtype": "bfloat16"}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"optimizer": {"lr": 2e-5}},
    "full, checkpointing": {"optimizer": {"lr": 2e-5}, "model": {"activation_checkpointing": True}},
    "full, adamw-8bit": {"optimizer": {"type": "adamw-8bit", "lr": 2e-5}},
    "full, adafactor": {"optimizer": {"type": "adafactor", "lr": 1e-3}},
    "full, bf16-true, adamw-bf16": {"optimizer": {"type": "adamw-bf16", "lr": 2e-5}, "precision": "bf16-true"},
    "lora": {"optimizer": {"lr": 2e-4}, "model": LORA},
    "qlora int8": {"optimizer": {"lr": 2e-4}, "model": {**LORA, "quantize": "int8"}},
    "qlora nf4": {"optimizer": {"lr": 2e-4}, "model": {**LORA, "quantize": "nf4"}},
    "qlora nf4, checkpointing": {
        "optimizer": {"lr": 2e-4},
        "model": {**LORA, "quantize": "nf4", "activation_checkpointing": True},
    },
}


def status(name: str) -> int:
    """Return bytes of this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def forget_peak() -> None:
    """Begin to count the most memory again."""
    Path("/proc/self/clear_refs").write_text("5")


def recipe(arguments: argparse.Namespace, setting: str, folder: Path) -> dict[str, Any]:
    """Return the recipe of a setting."""
    said = SETTINGS[setting]
    data: dict[str, Any] = {
        "sources": [{"name_or_path": str(arguments.data), "max_rows": 400}],
        "max_length": arguments.length,
        "overflow": "drop",
    }
    if arguments.held:
        data |= {"eval_sources": [{"name_or_path": str(arguments.held), "max_rows": arguments.held_rows}]}
    return {
        "type": "sft", "data": data, "output_dir": str(folder), "accelerator": "cpu", "devices": 1,
        "max_steps": arguments.steps, "log_every": 1, "logger": ["jsonl"], "checkpoint": [], "scheduler": "constant",
        "eval_every": arguments.every, **said, "model": {"name_or_path": str(arguments.model), **said.get("model", {})},
    }  # fmt: skip


def full_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return data of which every token is trained, in rows without room."""
    source = {"name_or_path": str(arguments.data), "max_rows": 400, "columns": {"text": "answer"}}
    return {"type": "causal", "sources": [source], "max_length": arguments.length, "overflow": "drop"}


def loaded(said: dict[str, Any], folder: Path) -> Any:
    """Return the trainer of a recipe."""
    from posttrain.recipes.load import load

    file = folder / "recipe.yaml"
    file.write_text(json.dumps(said))
    return load(file)


def measured(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Train with a setting in this process, and return what it took and what it learned."""
    from allocated import own

    from posttrain import after, before
    from posttrain.tools import plan  # noqa: F401 - its imports belong to what is there before

    seen: dict[str, Any] = {"aside": 0.0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.keep or scratch) / setting
        made = loaded(recipe(arguments, setting, folder), Path(scratch))
        made.prepare()

        @before("trainer.setup")
        def begin(trainer: Any) -> None:
            seen["before"] = status("VmRSS")

        @before("trainer.fit")
        def start(trainer: Any) -> None:
            own(trainer.run.model)
            if arguments.every:
                trainer.evaluate()
            forget_peak()
            seen["began"], seen["aside"] = time.process_time(), 0.0

        @before("trainer.evaluate")
        def pause(trainer: Any) -> None:
            seen["paused"] = time.process_time()

        @after("trainer.evaluate")
        def go_on(trainer: Any, result: Any) -> None:
            seen["aside"] += time.process_time() - seen["paused"]

        @after("trainer.count")
        def count(trainer: Any, result: None) -> None:
            seen["peak"] = status("VmHWM")
            seen["seconds"] = time.process_time() - seen["began"] - seen["aside"]

        made.train(callbacks=[begin, start, pause, go_on, count])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "peak": seen["peak"] - seen["before"], "losses": [line["loss"] for line in lines if "loss" in line],
        "held": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "tokens": sum(line.get("tokens", 0) for line in lines) / seen["seconds"],
    }  # fmt: skip


def counted(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Take two steps on rows that are full, and return the most bytes of tensors."""
    from allocated import training

    with tempfile.TemporaryDirectory() as scratch:
        full = {"data": full_rows(arguments), "max_steps": 2, "eval_every": None}
        return {"tensors": training(loaded(recipe(arguments, setting, Path(scratch) / "run") | full, Path(scratch)))}


def planned(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Return what a plan says of a setting."""
    from posttrain.tools import plan

    with tempfile.TemporaryDirectory() as folder:
        made = loaded(recipe(arguments, setting, Path(folder) / "run"), Path(folder))
        return {"plan": plan.estimate(made, 1).total}


def trl(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Train with TRL, peft and bitsandbytes; its rows are packed by itself, so its losses are of other rows."""
    import torch
    from allocated import own
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    keys: dict[str, Any] = {}
    if "nf4" in setting:
        keys["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    rows = load_dataset("json", data_files=str(arguments.data), split="train[:400]").map(
        lambda row: {"prompt": [{"role": "user", "content": row["question"]}],
                     "completion": [{"role": "assistant", "content": row["answer"]}]},
        remove_columns=["question", "answer"],
    )  # fmt: skip
    before = status("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, **keys)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if "lora" in setting else None
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=arguments.steps, per_device_train_batch_size=1, max_length=arguments.length,
            packing=True, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
            learning_rate=2e-4, gradient_checkpointing="checkpointing" in setting, disable_tqdm=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        made = SFTTrainer(model, args=config, train_dataset=rows, peft_config=lora, processing_class=tokenizer)
        own(made.model)
        forget_peak()
        began = time.process_time()
        made.train()
        seconds, tokens = time.process_time() - began, 0.995 * arguments.length * arguments.steps
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return {"peak": status("VmHWM") - before, "losses": losses, "tokens": tokens / seconds}


def alone(arguments: argparse.Namespace, what: str, setting: str) -> dict[str, Any]:
    """Do one thing in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--only", setting, "--model", arguments.model,
               "--data", arguments.data, "--steps", arguments.steps]  # fmt: skip
    for name in ("length", "held", "held_rows", "every", "keep"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name.replace('_', '-')}", value]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} {setting}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(arguments: argparse.Namespace) -> None:
    """Print the table."""
    head = ["setting", "plan MB", "tensors MB", "plan / tensors"]
    if not arguments.tensors:
        head += ["process MB", "loss, first to last", "held", "tokens per CPU s"]
    row(head)
    row(["---"] * len(head))
    for setting in SETTINGS if not arguments.only else [arguments.only]:
        said = alone(arguments, "plan", setting)["plan"]
        tensors = alone(arguments, "count", setting)["tensors"]
        shown = [f"{said / 1e6:,.0f}", f"{tensors / 1e6:,.0f}", f"{said / tensors:.3f}"]
        row([setting, *shown, *([] if arguments.tensors else learned(alone(arguments, "train", setting)))])
        if arguments.trl and setting in ("full", "lora", "qlora nf4", "qlora nf4, checkpointing"):
            row([f"{setting} (TRL)", "", "", "", *learned(alone(arguments, "trl", setting))])


def learned(found: dict[str, Any]) -> list[str]:
    """Return the cells of a training: its peak, losses and speed."""
    held = found.get("held") or []
    losses = f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"
    return [f"{found['peak'] / 1e6:,.0f}", losses, f"{held[-1]:.3f}" if held else "", f"{found['tokens']:.0f}"]


def row(cells: list[str]) -> None:
    """Print one line of a table."""
    sys.stdout.write("| " + " | ".join(cells) + " |\n")
    sys.stdout.flush()


def curves(arguments: argparse.Namespace) -> None:
    """Train everything, adapters, and adapters on 4 bits; print what each learned and took, and draw how."""
    from posttrain.tools import plot

    settings = ["full", "lora", "qlora nf4"]
    head = ["", "learning rate", "held-out loss before", "after", "process MB", "tokens per CPU s"]
    row(head)
    row(["---"] * len(head))
    with tempfile.TemporaryDirectory() as arguments.keep:
        for setting in settings:
            found = alone(arguments, "train", setting)
            cells = [f"{loss:.3f}" for loss in (found["held"][0], found["held"][-1])]
            rate = f"{SETTINGS[setting]['optimizer']['lr']:g}"
            row([setting, rate, *cells, f"{found['peak'] / 1e6:,.0f}", f"{found['tokens']:.0f}"])
        plot.curves([Path(arguments.keep) / setting for setting in settings], ["loss"], Path(arguments.curves))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--data", help="questions and answers, one a line")
    parser.add_argument("--held", help="others, to evaluate on")
    parser.add_argument("--held-rows", type=int, default=12, help="how many of them")
    parser.add_argument("--every", type=int, help="evaluate after so many steps, and before the first")
    parser.add_argument("--only", help="one setting, or with --table one model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, and of a step")
    parser.add_argument("--tensors", action="store_true", help="only what tensors take, in two steps, beside the plan")
    parser.add_argument("--trl", action="store_true", help="TRL with peft and bitsandbytes, too")
    parser.add_argument(
        "--curves", metavar="PICTURE", help="full, LoRA and QLoRA alone, with a picture of their losses"
    )
    parser.add_argument("--table", action="store_true", help="what fits on which card")
    parser.add_argument("--write", metavar="PAGE", help="put that table into a page")
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["train", "count", "plan", "trl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("data", "held"):
        if (file := getattr(arguments, name)) is not None and not Path(file).is_file():
            parser.error(f"--{name}: there is no file {file}; GSM8K's train and test rows as JSON lines are meant")
    if arguments.table:
        from fits import table

        table(arguments.write, arguments.only)
    elif arguments.child:
        do = {"train": measured, "count": counted, "plan": planned, "trl": trl}[arguments.child]
        sys.stdout.write("\n" + json.dumps(do(arguments, arguments.only)) + "\n")
    elif arguments.model is None or arguments.data is None:
        parser.error("give --model and --data (or --table)")
    elif arguments.tensors and arguments.trl:
        parser.error("--tensors and --trl exclude each other")
    elif arguments.curves:
        if arguments.held is None or not arguments.every:
            parser.error("--curves needs --held and --every")
        curves(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
