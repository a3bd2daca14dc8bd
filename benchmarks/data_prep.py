"""Tokens per CPU second of data preparation: posttrain from JSONL to disk, against the tokenizer's own batch encoding.

    python benchmarks/data_prep.py [--chats 2000] [--rounds 3] [--num-proc 2]

Chats of about 970 tokens are made of GSM8K questions and answers, and a BPE tokenizer of 8192 tokens is trained on
them. The floor is `encode_batch_fast` on texts that are rendered already: no template, no masks, no disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"


def tokenizer():
    """Train a byte-level BPE with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from posttrain.blocks.tokenizers.templates import TEMPLATES

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, show_progress=False)
    made.train_from_iterator(DATA.read_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|pad|>", additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATES["chatml"],
    )  # fmt: skip


def chats(count: int) -> list[dict]:
    """Return conversations of six questions and answers each."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    found = []
    for i in range(count):
        picked = [rows[(i * 6 + k * 7) % len(rows)] for k in range(6)]
        turns = [(("user", row["question"]), ("assistant", row["answer"])) for row in picked]
        found.append({"messages": [{"role": r, "content": c} for turn in turns for r, c in turn]})
    return found


def measured(work) -> tuple[float, int]:
    """Return CPU seconds and what the work returns: a number of tokens."""
    began = time.process_time()
    tokens = work()
    return time.process_time() - began, tokens


def over_processes(made, source: Path, cache: Path, count: int) -> None:
    """Print the CPU time of this process, which reads and writes, and of those that encode."""
    from posttrain.blocks.data.kinds.sft import SFTData
    from posttrain.blocks.data.sources import Source

    before, began = os.times(), time.perf_counter()
    data = SFTData(sources=[Source(name_or_path=str(source))], cache_dir=cache, num_proc=count)
    tokens, after = int(data.prepare(made).train.lengths.sum()), os.times()
    caller = after.user + after.system - before.user - before.system
    workers = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{count} processes: {tokens:,} tokens, {time.perf_counter() - began:.1f} s; ", end="")
    print(
        f"CPU s: {caller:.1f} of the caller, {workers:.1f} of the others; {tokens / caller / 1e6:.2f} Mtok per CPU s of the caller"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-proc", type=int, help="show instead what so many processes take, and their caller")
    chosen = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"{DATA} is not on this machine")
    from posttrain.blocks.data.kinds.sft import SFTData
    from posttrain.blocks.data.sources import Source

    made, rows = tokenizer(), chats(chosen.chats)
    texts = [made.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    backend = made.backend_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "chats.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
        if chosen.num_proc:
            over_processes(made, source, Path(folder) / "cache", chosen.num_proc)
            return
        rounds = iter(range(100))

        def floor() -> int:
            return sum(len(e.ids) for e in backend.encode_batch_fast(texts, add_special_tokens=False))

        def ours() -> int:
            data = SFTData(
                sources=[Source(name_or_path=str(source))], cache_dir=Path(folder) / str(next(rounds)), num_proc=1
            )
            return int(data.prepare(made).train.lengths.sum())

        def theirs() -> int:
            import datasets

            def encode(row):
                call = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": False}
                return made.apply_chat_template(row["messages"], **call)

            datasets.disable_progress_bars()
            loaded = datasets.load_dataset(
                "json", data_files=str(source), split="train", cache_dir=str(Path(folder) / f"hf{next(rounds)}")
            )
            return sum(map(len, loaded.map(encode)["input_ids"]))

        work = {
            "encode_batch_fast on rendered text (floor)": floor,
            "posttrain, JSONL to disk, with masks": ours,
            "datasets.map per row, JSONL to disk, no masks": theirs,
        }
        found = {name: [] for name in work}
        for _ in range(chosen.rounds):
            for name, call in work.items():
                seconds, tokens = measured(call)
                found[name].append(tokens / seconds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, commit {commit}; {chosen.chats} chats, one thread\n"
    )
    print("| | Mtok per CPU s | of the floor |\n|---|---|---|")
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rate in medians.items():
        print(f"| {name} | {rate / 1e6:.2f} | {rate / next(iter(medians.values())):.0%} |")


if __name__ == "__main__":
    main()
