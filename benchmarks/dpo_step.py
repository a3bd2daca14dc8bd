"""Tokens per CPU second of a DPO step: posttrain, two bare PyTorch loops on the same pairs, and TRL if installed.

    python benchmarks/dpo_step.py [--steps 10] [--rounds 3] [--only tiny]

A step is the same two pairs for every candidate, in the same order, with a frozen copy of the policy as reference.
Tokens are those of both sides that are not padding, the prompt counted twice, whatever a candidate computes of them.
"plain" puts both sides of the pairs into one padded batch and scores every position; "best" lays the sides of a pair
side by side, each seeing itself alone, and projects only the positions of the replies. One thread, float32, every
candidate in a process of its own, in alternating rounds; the table gives medians.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from functools import partial

from sft_step import CANDIDATES, LENGTH, ROOT, SHAPES, Clock, config, measure, train

PAIRS = 2


def pairs(shape: str) -> list[tuple[list[int], list[int], list[int]]]:
    """Return 4000 prompts with a chosen and a rejected reply, with lengths as in chat data."""
    chance = random.Random(0)
    vocabulary = SHAPES[shape]["vocab_size"]

    def text(length: int) -> list[int]:
        return [chance.randrange(1, vocabulary) for _ in range(length)]

    def reply() -> list[int]:
        return text(min(LENGTH - 100, int(chance.lognormvariate(4.6, 0.5)) + 8))

    return [(text(chance.randint(20, 90)), reply(), reply()) for _ in range(4000)]


def loader(shape: str, packing: bool):
    """Return posttrain's loader of two pairs a step: every candidate takes the very same pairs."""
    import numpy as np

    from posttrain.blocks.data.loader import MapLoader
    from posttrain.blocks.layout import Example, collate_pairs

    class Pairs:
        def __init__(self):
            self.found = [
                Example(
                    tuple((np.array(prompt + side), np.arange(len(prompt + side)) >= len(prompt)) for side in sides)
                )
                for prompt, *sides in pairs(shape)
            ]
            self.lengths = np.array([len(pair) for pair in self.found])
            self.source, self.weights = np.zeros(len(self.found), dtype=int), [1.0]

        def __len__(self):
            return len(self.found)

        def __getitem__(self, index):
            return self.found[index]

    return MapLoader(
        examples=Pairs(), max_length=2 * LENGTH, packing=False, micro_batch_size=PAIRS, rank=0, world_size=1, seed=0,
        collate=partial(collate_pairs, packing=packing),
    )  # fmt: skip


def bare(shape: str, steps: int, project_all: bool) -> dict:
    """A loop that anybody would write."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model, clock = LlamaForCausalLM(config(shape)), Clock()
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def log_probs(network, batch):
        ids = batch["input_ids"]
        if project_all:
            real = torch.arange(ids.shape[1]) <= batch["ends"][:, None] % ids.shape[1]
            logits = network(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
            goals = batch["labels"][:, 1:]
            found = logits.float().log_softmax(-1).gather(2, goals.clamp(min=0)[..., None])[..., 0]
            return (found * (goals >= 0)).sum(1).view(PAIRS, 2)
        call = {"input_ids": ids, "position_ids": batch["position_ids"], "use_cache": False}
        logits = network.lm_head(network.model(**call).last_hidden_state.flatten(0, 1)[batch["supervised"]])
        found = -F.cross_entropy(logits.float(), batch["targets"], reduction="none")
        return found.new_zeros(2 * PAIRS).index_add(0, batch["side"], found).view(PAIRS, 2)

    source = loader(shape, packing=not project_all)
    for (batch, _), _ in zip(source.batches(source.start()), range(steps + 3), strict=False):
        with torch.no_grad():
            theirs = log_probs(reference, batch)
        gain = log_probs(model, batch) - theirs
        loss = -F.logsigmoid(0.1 * (gain[:, 0] - gain[:, 1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(batch["tokens"])
    return clock.result() | {"loss": loss.item()}


def posttrain_(shape: str, steps: int) -> dict:
    """The trainer as users call it, its loggers and metrics included."""
    import posttrain

    clock = Clock()

    @posttrain.before("trainer.count")
    def tick(trainer, batches, position, loss, lr):
        clock.step(sum(batch["tokens"] for batch in batches))
        last["loss"] = float(loss)

    last: dict[str, float] = {}
    train(posttrain.DPOTrainer, loader(shape, packing=True), shape, steps, PAIRS, lr=1e-6, callbacks=[tick])
    return clock.result() | last


def trl(shape: str, steps: int) -> dict:
    """TRL's DPOTrainer on the same pairs, which it is given as tokens."""
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tokens import byte_tokenizer

    clock, waiting = Clock(), []

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            clock.step(waiting.pop(0))

    class SamePairs(DPOTrainer):
        def _prepare_dataset(self, dataset, *more):
            return dataset

        def _get_train_sampler(self, *more):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def collate(examples, inner=DataCollatorForPreference(pad_token_id=0)):  # noqa: B008
        batch = inner(examples)
        waiting.append(int(batch["attention_mask"].sum()))
        return batch

    found, order = pairs(shape), loader(shape, packing=True).plan(0)
    rows = [found[i] for row in order[: PAIRS * (steps + 3)] for i in row]
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, zip(*rows, strict=True)), strict=True))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(shape))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SamePairs(
            model=model, ref_model=copy.deepcopy(model), train_dataset=Dataset.from_dict(columns),
            processing_class=byte_tokenizer(), data_collator=collate, callbacks=[Tick()],
            args=DPOConfig(
                output_dir=folder, max_length=LENGTH, max_steps=steps + 3, per_device_train_batch_size=PAIRS,
                learning_rate=1e-6, optim="adamw_torch_fused", use_cpu=True, bf16=False, logging_steps=10,
                save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
                dataloader_pin_memory=False,
            ),
        )  # fmt: skip
        trainer.train()
    return clock.result()


def describe(shape: str) -> str:
    """Return what the pairs are like."""
    found = pairs(shape)
    prompts = sum(len(prompt) for prompt, _, _ in found)
    tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in found)
    source = loader(shape, packing=False)
    padded = [batch for (batch, _), _ in zip(source.batches(source.start()), range(200), strict=False)]
    real = sum(batch["tokens"] for batch in padded) / sum(batch["input_ids"].numel() for batch in padded)
    return f"{prompts / tokens:.1%} of the tokens repeat a prompt; padded batches are {real:.1%} real"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        run = {
            "posttrain": posttrain_,
            "trl": trl,
            "plain": lambda *c: bare(*c, True),
            "best": lambda *c: bare(*c, False),
        }
        print(json.dumps(run[chosen.one](chosen.only, chosen.steps)))
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, commit {commit}")
    print(describe("tiny") + "\n")
    print("| model | " + " | ".join(f"{n} tok/CPU s" for n in CANDIDATES) + " | / plain | / best | / trl | peak MB |")
    print("|---|" + "---|" * (len(CANDIDATES) + 4))
    for shape in [chosen.only] if chosen.only else SHAPES:
        found: dict[str, list[dict]] = {name: [] for name in CANDIDATES}
        for _ in range(chosen.rounds):
            for name in CANDIDATES:
                if (result := measure(__file__, name, "--only", shape, "--steps", str(chosen.steps))) is not None:
                    found[name].append(result)
        rate = {n: statistics.median(r["rate"] for r in results) for n, results in found.items() if results}
        peak = {n: statistics.median(r["mb"] for r in results) for n, results in found.items() if results}
        rates = " | ".join(f"{rate[n]:.0f}" if n in rate else "-" for n in CANDIDATES)
        over = " | ".join(f"{rate['posttrain'] / rate[n]:.2f}" if n in rate else "-" for n in CANDIDATES[1:])
        peaks = " / ".join(f"{peak[n]:.0f}" if n in peak else "-" for n in CANDIDATES)
        print(f"| {shape} | {rates} | {over} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
