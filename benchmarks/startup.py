"""Seconds from a command to what it is for, each in a process of its own: posttrain, and TRL if it is installed.

    python benchmarks/startup.py [--rounds 3]

Wall time and CPU time, medians of alternating rounds. "first step" is a tiny Llama with a byte tokenizer and 64 chats in a
JSONL file: import, read, tokenize, build, and the first optimizer step.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
RECIPE = """\
type: sft
model: {name_or_path: model}
data: {sources: [chats.jsonl], max_length: 256}
optimizer: {lr: 1e-4}
max_steps: 1
checkpoint: []
resume: never
accelerator: cpu
"""
TRL = """\
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
SFTTrainer(
    model="model", train_dataset=load_dataset("json", data_files="chats.jsonl", split="train"),
    args=SFTConfig(output_dir="trl", max_length=256, packing=True, max_steps=1, per_device_train_batch_size=1, use_cpu=True,
                   bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"}),
).train()
"""


def prepare(folder: Path) -> None:
    """Write a model, chats, and what each candidate starts from."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tokens import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.blocks.tokenizers.templates import TEMPLATES

    made = byte_tokenizer(TEMPLATES["chatml"])
    made.save_pretrained(folder / "model")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(made), num_key_value_heads=4, **shape)).save_pretrained(
        folder / "model"
    )
    chats = [{"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": str(2 * n)}]}
             for n in range(64)]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "with_trl.py").write_text(TRL)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    cli = [sys.executable, "-m", "posttrain.cli"]
    libraries = "import torch; from transformers import AutoTokenizer, LlamaForCausalLM"
    commands = {
        "torch and transformers: import": [sys.executable, "-c", libraries],
        "posttrain: import": [sys.executable, "-c", "import posttrain"],
        "posttrain: check a recipe": [*cli, "check", "recipe.yaml"],
        "posttrain: first step": [*cli, "train", "recipe.yaml"],
    }
    if importlib.util.find_spec("trl"):
        commands |= {
            "TRL: import SFTTrainer": [sys.executable, "-c", "from trl import SFTTrainer"],
            "TRL: first step": [sys.executable, "with_trl.py"],
        }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        environment = {**ENVIRONMENT, "POSTTRAIN_CACHE": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/hf"}
        for _ in range(rounds + 1):  # the first one warms the disk up
            for name, command in commands.items():
                before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-2000:]}")
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                spent[name].append((time.perf_counter() - began, cpu))
    print("| | seconds | CPU seconds |\n|---|---|---|")
    for name, times in spent.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[1:], strict=True))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
