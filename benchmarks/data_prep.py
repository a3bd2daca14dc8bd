"""How fast chats become tokens and masks, against the tokenizer's own batch encoding.

    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python benchmarks/data_prep.py path/to/gsm8k_train.jsonl

Chats of some 970 tokens are joined from GSM8K's questions and answers, and a byte-level BPE of 8192 ids is trained on
them. Figures are tokens per second of CPU time (all threads), the best of some repetitions.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def chats(file: Path, count: int) -> list[dict[str, Any]]:
    """Join six questions and answers to a chat."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = []
    for number in range(count):
        messages = [{"role": "system", "content": "You solve word problems."}]
        for row in (rows[(number * 6 + i) % len(rows)] for i in range(6)):
            messages.append({"role": "user", "content": row["question"]})
            messages.append({"role": "assistant", "content": row["answer"]})
        found.append({"messages": messages})
    return found


def tokenizer_for(file: Path) -> Any:
    """Train a byte-level BPE with ChatML's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from posttrain.blocks.templates import TEMPLATES

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((row["question"] + "\n" + row["answer"] for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATES["chatml"],
    )  # fmt: skip


def measured(work: Callable[[], Any], repeats: int) -> float:
    """Return the least CPU seconds that some work took."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--chats", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    said = parser.parse_args()

    from posttrain.blocks import store
    from posttrain.blocks.data import SFTData
    from posttrain.blocks.sources import Source

    rows, tokenizer = chats(said.file, said.chats), tokenizer_for(said.file)
    encoder = SFTData(sources=[Source(name_or_path="x.jsonl")]).encoder(tokenizer)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    backend = tokenizer.backend_tokenizer
    lengths = [len(e.ids) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    batches = [range(i, min(i + store.BATCH, len(rows))) for i in range(0, len(rows), store.BATCH)]

    def each(work: Callable[[list[Any]], Any], items: list[Any]) -> Callable[[], None]:
        return lambda: [work([items[i] for i in batch]) for batch in batches] and None

    def ids_only(batch: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = Source(name_or_path=str(path))

        def to_disk() -> None:
            with tempfile.TemporaryDirectory() as cache:
                store.table(source, encoder, Path(cache))

        table = {
            "encode_batch_fast, ids": each(ids_only, texts),
            "encode_batch (with offsets)": each(lambda b: backend.encode_batch(b, add_special_tokens=False), texts),
            "apply_chat_template + encode_batch_fast": each(
                lambda b: ids_only(tokenizer.apply_chat_template([r["messages"] for r in b], tokenize=False)), rows
            ),
            "posttrain: two renders, ids, masks": each(encoder.encode, rows),
            "posttrain: JSONL to memory-mapped arrays": to_disk,
        }
        seconds = {name: measured(work, said.repeats) for name, work in table.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, commit {commit or 'unknown'}"
    )
    print(f"{len(rows)} chats of {statistics.mean(lengths):.0f} tokens, {sum(lengths):,} in all\n")
    print("| step | tokens per CPU second | share of the tokenizer alone |\n|---|---:|---:|")
    floor = seconds["encode_batch_fast, ids"]
    for name, spent in seconds.items():
        print(f"| {name} | {sum(lengths) / spent:,.0f} | {floor / spent:.0%} |")


if __name__ == "__main__":
    main()
