"""Tokens per CPU second of a training step: posttrain, a bare PyTorch loop on the same batches, and TRL if installed.

    python benchmarks/sft_step.py [--steps 12] [--rounds 3] [--only tiny] [--arctic PYTHON]

Every candidate runs in a process of its own, in alternating rounds; the table gives medians. One thread, float32.
"plain" scores every position, as `model(labels=...)` does; "best" projects only the positions that are supervised.
ArcticTraining takes part from an environment of its own (see arctic_step.py).
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 4096},
    "heavy": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 32000},
}
LENGTH, ROWS = 512, 2
CANDIDATES = ("posttrain", "plain", "best", "trl")


def config(shape: str):
    """Return the Llama of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(num_attention_heads=8, num_key_value_heads=4, pad_token_id=0, **SHAPES[shape])


def documents(shape: str, replies_only: bool) -> list[tuple[list[int], list[bool]]]:
    """Return 4000 chats as token ids: a system text, a question and a reply, with lengths as in chat data."""
    chance = random.Random(0)
    vocabulary = SHAPES[shape]["vocab_size"]
    found = []
    for _ in range(4000):
        prompt, reply = chance.randint(20, 120), min(380, int(chance.lognormvariate(4.6, 0.6)) + 8)
        ids = [chance.randrange(1, vocabulary) for _ in range(prompt + reply)]
        found.append((ids, [not replies_only] * prompt + [True] * reply))
    return found


def loader(shape: str, replies_only: bool):
    """Return posttrain's loader: both loops take the very same batches from it."""
    import numpy as np

    from posttrain.blocks.data.loader import MapLoader
    from posttrain.blocks.layout import Example

    class Documents:
        def __init__(self):
            self.found = [(np.array(ids), np.array(mask)) for ids, mask in documents(shape, replies_only)]
            self.lengths = np.array([len(ids) for ids, _ in self.found])
            self.source, self.weights = np.zeros(len(self.found), dtype=int), [1.0]

        def __len__(self):
            return len(self.found)

        def __getitem__(self, index):
            return Example((self.found[index],))

    return MapLoader(
        examples=Documents(),
        max_length=LENGTH,
        packing=True,
        micro_batch_size=ROWS,
        rank=0,
        world_size=1,
        seed=0,
    )


class Clock:
    """Counts CPU seconds and tokens of the steps after the first three."""

    def __init__(self):
        self.steps, self.tokens, self.began, self.spent = 0, 0, 0.0, 0.0

    def step(self, tokens: int) -> None:
        """Take note of a finished step."""
        self.steps += 1
        if self.steps == 3:
            self.began = time.process_time()
        elif self.steps > 3:
            self.tokens += tokens
            self.spent = time.process_time() - self.began

    def result(self) -> dict:
        """Return what was measured."""
        import resource

        return {
            "rate": self.tokens / self.spent, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        }  # fmt: skip


def bare(shape: str, steps: int, replies_only: bool, project_all: bool) -> dict:
    """A loop that anybody would write."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model, clock = LlamaForCausalLM(config(shape)), Clock()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    source = loader(shape, replies_only)
    for (batch, _), _ in zip(source.batches(source.start()), range(steps + 3), strict=False):
        call = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        if project_all:
            logits = model(**call).logits.flatten(0, 1)[batch["supervised"]]
        else:
            hidden = model.model(**call).last_hidden_state.flatten(0, 1)[batch["supervised"]]
            logits = model.lm_head(hidden)
        F.cross_entropy(logits.float(), batch["targets"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(batch["tokens"])
    return clock.result()


def posttrain_(shape: str, steps: int, replies_only: bool) -> dict:
    """The trainer as users call it, its loggers and metrics included."""
    import posttrain

    clock = Clock()

    @posttrain.before("trainer.save")
    def tick(trainer, at_end):
        if not at_end:
            clock.step(tokens[-1])

    tokens: list[int] = []

    @posttrain.before("trainer.step")
    def count(trainer, batches):
        tokens.append(sum(batch["tokens"] for batch in batches))

    train(posttrain.SFTTrainer, loader(shape, replies_only), shape, steps, ROWS, lr=1e-4, callbacks=[tick, count])
    return clock.result()


def train(trainer: type, batches, shape: str, steps: int, micro_batch_size: int, lr: float, callbacks: list) -> None:
    """Run a trainer of ours on the batches of a loader."""
    import posttrain
    from posttrain.interfaces import Loaders

    @posttrain.block("data", "benchmark")
    class Data:
        def build(self, tokenizer, micro_batch_size, rank, world_size, seed):
            return Loaders(train=batches)

    @posttrain.block("tokenizer", "none")
    class Nothing:
        def build(self, model):
            return None

    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=posttrain.HFModel(name_or_path="x", random_init=True, config=config(shape).to_dict()), data=Data(),
            tokenizer=Nothing(), optimizer=posttrain.AdamW(lr=lr), scheduler=posttrain.Constant(), checkpoint=[],
            logger=[posttrain.JSONL()], micro_batch_size=micro_batch_size, max_steps=steps + 3,
            output_dir=Path(folder), accelerator="cpu",
        ).train(callbacks=callbacks)  # fmt: skip


def trl(shape: str, steps: int, replies_only: bool) -> dict:
    """TRL's SFTTrainer on the same documents, packed best-fit as it does."""
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tokens import byte_tokenizer

    clock = Clock()

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            clock.step(ROWS * LENGTH * 0.995)  # TRL packs to 99.5 % on these data

    found = documents(shape, replies_only)
    rows = Dataset.from_dict({
        "input_ids": [ids for ids, _ in found], "completion_mask": [[int(m) for m in mask] for _, mask in found],
    })  # fmt: skip
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=LlamaForCausalLM(config(shape)), train_dataset=rows, processing_class=tokenizer, callbacks=[Tick()],
            args=SFTConfig(
                output_dir=folder, max_length=LENGTH, packing=True, packing_strategy="bfd", max_steps=steps + 3,
                per_device_train_batch_size=ROWS, learning_rate=1e-4, optim="adamw_torch_fused", use_cpu=True, bf16=False,
                logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
                completion_only_loss=replies_only, dataloader_pin_memory=False,
            ),
        ).train()  # fmt: skip
    return clock.result()


def measure(script: str, name: str, *options: str) -> dict | None:
    """Run one candidate of a benchmark in a process of its own."""
    return run_one(name, [sys.executable, script, "--one", name, *options])


def run_one(name: str, command: list[str]) -> dict | None:
    """Return what a command prints on its last line; None, and a message, if it does not run here."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} does not run here: {done.stderr.strip().splitlines()[-1][:100]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--replies-only", action="store_true")
    parser.add_argument("--arctic", metavar="PYTHON", help="of an environment in which ArcticTraining is installed")
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        call = (chosen.only, chosen.steps, chosen.replies_only)
        run = {
            "posttrain": posttrain_,
            "trl": trl,
            "plain": lambda *c: bare(*c, True),
            "best": lambda *c: bare(*c, False),
        }
        print(json.dumps(run[chosen.one](*call)))
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, commit {commit}\n")
    names = [*CANDIDATES, *(["arctic"] if chosen.arctic else [])]
    others = ["best", "trl", *names[4:]]
    heads = [*(f"{name} tok/CPU s" for name in names), *(f"/ {name}" for name in others), "peak MB"]
    print("| model | trained | " + " | ".join(heads) + " |\n|---|---|" + "---|" * len(heads))
    for shape in [chosen.only] if chosen.only else SHAPES:
        for replies_only in (False, True):
            found: dict[str, list[dict]] = {name: [] for name in names}
            trained = "replies" if replies_only else "everything"
            arctic = [chosen.arctic, str(Path(__file__).with_name("arctic_step.py")), shape, str(chosen.steps), trained]
            options = ["--only", shape, "--steps", str(chosen.steps), *(["--replies-only"] if replies_only else [])]
            for _ in range(chosen.rounds):
                for name in names:
                    result = run_one(name, arctic) if name == "arctic" else measure(__file__, name, *options)
                    if result is not None:
                        found[name].append(result)
            rate = {n: statistics.median(r["rate"] for r in results) for n, results in found.items() if results}
            peak = {n: statistics.median(r["mb"] for r in results) for n, results in found.items() if results}
            rates = " | ".join(f"{rate[n]:.0f}" if n in rate else "-" for n in names)
            over = " | ".join(f"{rate['posttrain'] / rate[n]:.2f}" if n in rate else "-" for n in others)
            peaks = " / ".join(f"{peak[n]:.0f}" if n in peak else "-" for n in names)
            print(f"| {shape} | {trained} | {rates} | {over} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
