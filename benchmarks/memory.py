"""Peak memory of training beside what `posttrain plan` says: full, adapters, a base of 4 bits, optimizers with less state.

    python benchmarks/memory.py --model FOLDER --data gsm8k_train.jsonl [--only qlora] [--steps 6] [--trl]
    python benchmarks/memory.py --table        # what fits on 24, 48 and 80 GB, for shapes of known models

Every setting runs in a process of its own, on a CPU with one thread, on the same rows in the same order. Measured is the
most memory of the process while it trains (Linux's VmHWM), above what it has after its imports; parameters are copied
out of their files first, as moving them to a GPU would do. Tokens are per CPU second.
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
sys.path.insert(0, str(ROOT))

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
LENGTH = 512


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
    held = [str(arguments.held)] if arguments.held else []
    data = {
        "sources": [{"name_or_path": str(arguments.data), "max_rows": 400}],
        "max_length": LENGTH,
        "overflow": "drop",
    }
    if held:
        data |= {"eval_sources": [{"name_or_path": held[0], "max_rows": 12}]}
    return {
        "type": "sft", "data": data, "output_dir": str(folder), "accelerator": "cpu", "devices": 1,
        "max_steps": arguments.steps, "log_every": 1, "logger": ["jsonl"], "checkpoint": [], "scheduler": "constant",
        **said, "model": {"name_or_path": str(arguments.model), **said.get("model", {})},
    }  # fmt: skip


def measured(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Train with a setting in this process, and return what it took and what it learned."""
    from posttrain import after, before
    from posttrain.recipes.load import load
    from posttrain.tools import plan  # noqa: F401 - its imports belong to what is there before

    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(json.dumps(recipe(arguments, setting, Path(folder) / "run")))
        made = load(file)
        made.prepare()

        @before("trainer.setup")
        def begin(trainer: Any) -> None:
            seen["before"] = status("VmRSS")

        @before("trainer.fit")
        def start(trainer: Any) -> None:
            for parameter in trainer.run.model.parameters():
                parameter.data = parameter.data.clone()
            forget_peak()
            seen["began"] = time.process_time()

        @after("trainer.count")
        def count(trainer: Any, result: None) -> None:
            seen["peak"] = status("VmHWM")
            seen["seconds"] = time.process_time() - seen["began"]

        made.train(callbacks=[begin, start, count])
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "peak": seen["peak"] - seen["before"], "losses": losses, "held": lines[-1].get("eval_loss"),
        "tokens": sum(line.get("tokens", 0) for line in lines) / seen["seconds"],
    }  # fmt: skip


def planned(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Return what a plan says of a setting."""
    from posttrain.recipes.load import load
    from posttrain.tools import plan

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(json.dumps(recipe(arguments, setting, Path(folder) / "run")))
        return {"plan": plan.estimate(load(file), 1).device}


def trl(arguments: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Train with TRL, peft and bitsandbytes; its rows are packed by itself, so its losses are of other rows."""
    import torch
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
            output_dir=folder, max_steps=arguments.steps, per_device_train_batch_size=1, max_length=LENGTH,
            packing=True, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1,
            learning_rate=2e-4, gradient_checkpointing="checkpointing" in setting, disable_tqdm=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        made = SFTTrainer(model, args=config, train_dataset=rows, peft_config=lora, processing_class=tokenizer)
        for parameter in made.model.parameters():
            parameter.data = parameter.data.clone()
        forget_peak()
        began = time.process_time()
        made.train()
        seconds, tokens = time.process_time() - began, 0.995 * LENGTH * arguments.steps
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return {"peak": status("VmHWM") - before, "losses": losses, "tokens": tokens / seconds}


def alone(arguments: argparse.Namespace, what: str, setting: str) -> dict[str, Any]:
    """Do one thing in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--only", setting, "--model", arguments.model,
               "--data", arguments.data, "--steps", arguments.steps]  # fmt: skip
    command += ["--held", arguments.held] if arguments.held else []
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} {setting}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(arguments: argparse.Namespace) -> None:
    """Print the table."""
    sys.stdout.write("| setting | plan MB | peak MB | plan / peak | loss, first to last | held | tokens per CPU s |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for setting in SETTINGS if not arguments.only else [arguments.only]:
        said = sum(alone(arguments, "plan", setting)["plan"].values())
        both = arguments.trl and setting in ("full", "lora", "qlora nf4", "qlora nf4, checkpointing")
        for name in ("", " (TRL)") if both else ("",):
            found = alone(arguments, "trl" if name else "train", setting)
            shown = (f"{said / 1e6:,.0f}", f"{said / found['peak']:.2f}") if not name else ("", "")
            held = f"{found['held']:.3f}" if found.get("held") else ""
            sys.stdout.write(
                f"| {setting}{name} | {shown[0]} | {found['peak'] / 1e6:,.0f} | {shown[1]} | "
                f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f} | {held} | {found['tokens']:.0f} |\n"
            )
            sys.stdout.flush()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--data", help="questions and answers, one a line")
    parser.add_argument("--held", help="others, to evaluate on")
    parser.add_argument("--only", help="one setting, or with --table one model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trl", action="store_true", help="TRL with peft and bitsandbytes, too")
    parser.add_argument("--table", action="store_true", help="what fits on which card")
    parser.add_argument("--write", metavar="PAGE", help="put that table into a page")
    parser.add_argument("--child", choices=["train", "plan", "trl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        from fits import table

        table(arguments.write, arguments.only)
    elif arguments.child:
        do = {"train": measured, "plan": planned, "trl": trl}[arguments.child]
        sys.stdout.write("\n" + json.dumps(do(arguments, arguments.only)) + "\n")
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
