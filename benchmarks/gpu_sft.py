"""Tokens per second, MFU and peak memory of SFT on one GPU: posttrain, a bare PyTorch loop, and TRL if installed.

    python benchmarks/gpu_sft.py                 # about 1.2 B parameters, bf16, packed rows of 4096; a few minutes
    python benchmarks/gpu_sft.py --longest       # then the longest row that fits, with everything on
    bash benchmarks/gpu.sh                       # this and all else that is to be known of a GPU
    python benchmarks/gpu_sft.py --tiny          # the same code on a CPU, to see that it runs

Random weights in the shape of Llama 3.2 1B. Every candidate runs in a process of its own, in alternating rounds; the
table gives medians. The bare loop trains on the same batches with the same attention kernel and optimizer.

MFU counts what the model needs, not what is computed twice: 6 operations per token and parameter of a matrix product
(the output layer included, the embedding not), and 6 * layers * heads * head size * length^2 per causal document
(PaLM, arXiv:2204.02311, appendix B, halved because it is causal), over the dense bf16 peak of the GPU's data sheet.
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
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

CANDIDATES = ("posttrain", "bare", "trl")
WARM_UP = 3


@dataclass
class Setting:
    """What is measured, the same for all candidates."""

    tiny: bool
    steps: int
    rows: int
    length: int
    compile: bool
    packing: bool = True

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    def config(self):
        """Return the Llama's configuration."""
        from transformers import LlamaConfig

        small = {
            "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 512,
        }  # fmt: skip
        large = {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "rope_theta": 5e5,
        }  # fmt: skip
        longest = max(self.length, 4096)
        return LlamaConfig(pad_token_id=0, max_position_embeddings=longest, **(small if self.tiny else large))

    def documents(self) -> list[list[int]]:
        """Return random documents with lengths as in chat data, or of a whole row each."""
        chance, vocabulary = random.Random(0), self.config().vocab_size
        count = (self.steps + WARM_UP + 1) * self.rows * (self.length // 256 + 1 if self.packing else 1)
        sizes = [min(self.length, int(chance.lognormvariate(5.6, 0.8)) + 16) for _ in range(count)]
        return [[chance.randrange(1, vocabulary) for _ in range(n if self.packing else self.length)] for n in sizes]

    def loader(self):
        """Return posttrain's loader of the documents, every token trained."""
        import numpy as np

        from posttrain.blocks.data.loader import MapLoader
        from posttrain.blocks.layout import Example

        class Documents:
            def __init__(self, found):
                self.found = [(np.array(ids), np.ones(len(ids), dtype=bool)) for ids in found]
                self.lengths = np.array([len(ids) for ids, _ in self.found])
                self.source, self.weights = np.zeros(len(self.found), dtype=int), [1.0]

            def __len__(self):
                return len(self.found)

            def __getitem__(self, index):
                return Example((self.found[index],))

        return MapLoader(
            examples=Documents(self.documents()), max_length=self.length, packing=self.packing,
            micro_batch_size=self.rows, rank=0, world_size=1, seed=0,
        )  # fmt: skip


class Clock:
    """Measures the steps after the warm-up; the device is waited for at both ends and nowhere else."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.config = setting, setting.config()
        self.steps, self.tokens, self.operations, self.began, self.spent = 0, 0, 0.0, 0.0, 0.0

    def step(self, tokens: int, squares: float) -> None:
        """Take note of a finished step: its tokens, and the sum of its documents' squared lengths."""
        self.steps += 1
        if self.steps > WARM_UP:
            self.tokens += tokens
            self.operations += self.needed(tokens, squares)
        if self.steps == WARM_UP:
            self.began = self.now()
        elif self.steps == WARM_UP + self.setting.steps:
            self.spent = self.now() - self.began

    def needed(self, tokens: int, squares: float) -> float:
        """Return the operations of a forward and backward pass."""
        c = self.config
        size = c.hidden_size // c.num_attention_heads
        attention = 2 * c.hidden_size * size * (c.num_attention_heads + c.num_key_value_heads)
        layer = attention + 3 * c.hidden_size * c.intermediate_size
        products = c.num_hidden_layers * layer + c.vocab_size * c.hidden_size
        return 6.0 * products * tokens + 6.0 * c.num_hidden_layers * c.hidden_size * squares

    def now(self) -> float:
        import torch

        if not self.setting.tiny:
            torch.cuda.synchronize()
        return time.perf_counter()

    def result(self) -> dict:
        """Return what was measured."""
        import resource

        import torch

        if self.setting.tiny:
            peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, platform.machine()
        else:
            peak, name = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.get_device_name()
        from posttrain.blocks.callbacks.speed import peak_of

        speed = peak_of(torch.device("cpu" if self.setting.tiny else "cuda"))
        return {
            "rate": self.tokens / self.spent, "gib": peak, "device": name, "steps": self.steps,
            "mfu": self.operations / self.spent / speed / 1e12 if speed else None,
        }  # fmt: skip


def sizes(batch) -> tuple[int, float]:
    """Return the tokens of a batch that is still on the host, and the sum of its documents' squared lengths."""
    return batch["tokens"], float((batch["seqlens"].double() ** 2).sum())


def posttrain_(
    setting: Setting,
    method=None,
    block=None,
    source=None,
    callbacks=(),
    folder: str | None = None,
    trainer=None,
    **model,
) -> dict:
    """The trainer as users call it, its loggers and metrics included.

    Args:
        setting: what is measured.
        method, block: classes of the trainer and of the model; supervised fine-tuning of a causal model by default.
        source: a loader instead of the setting's.
        callbacks: more of them.
        folder: of the run; a temporary one by default.
        trainer: keys of the trainer.
        model: keys of the model.
    """
    import posttrain
    from posttrain.interfaces import Loaders

    clock, seen, source = Clock(setting), [], source or setting.loader()
    method, block = method or posttrain.SFTTrainer, block or posttrain.HFModel

    class Counted:
        """The loader, noting the sizes of batches while they are on the host."""

        def __getattr__(self, name):
            return getattr(source, name)

        def batches(self, position):
            for batch, after in source.batches(position):
                seen.append(sizes(batch))
                yield batch, after

    @posttrain.before("trainer.save")
    def tick(trainer, at_end):
        if not at_end:
            clock.step(*seen[clock.steps])

    @posttrain.block("data", "benchmark")
    class Data:
        def build(self, tokenizer, micro_batch_size, rank, world_size, seed):
            return Loaders(train=Counted())

    @posttrain.block("tokenizer", "none")
    class Nothing:
        def build(self, model):
            return None

    dtype = {} if setting.tiny else {"dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as scratch:
        keys = {
            "optimizer": posttrain.AdamW(lr=1e-5), "scheduler": posttrain.Constant(), "checkpoint": [],
            "logger": [posttrain.JSONL()], "micro_batch_size": setting.rows, "log_every": 10, "devices": 1,
            "max_steps": setting.steps + WARM_UP, "output_dir": Path(folder or scratch), "accelerator": setting.device,
            "precision": "32-true" if setting.tiny else "bf16-true",
        }  # fmt: skip
        network = {"name_or_path": "x", "random_init": True, "config": setting.config().to_dict()}
        method(
            model=block(**{**network, "compile": setting.compile, **dtype, **model}), data=Data(), tokenizer=Nothing(),
            **{**keys, **(trainer or {})},
        ).train(callbacks=[tick, *callbacks])  # fmt: skip
    return clock.result()


def bare(setting: Setting) -> dict:
    """A loop that anybody would write, on the same batches, with posttrain's attention kernel."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaForCausalLM

    from posttrain.blocks.models.documents import attention
    from posttrain.blocks.models.packed import inputs

    torch.manual_seed(0)
    with torch.device(setting.device):
        model = LlamaForCausalLM(setting.config())
    model = model.to(torch.float32 if setting.tiny else torch.bfloat16)
    model.set_attn_implementation(attention.NAME)
    if setting.compile:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clock, source = Clock(setting), setting.loader()
    for (batch, _), _ in zip(source.batches(source.start()), range(setting.steps + WARM_UP), strict=False):
        counted = sizes(batch)
        moved = batch.to(torch.device(setting.device))
        hidden = model.model(**inputs(moved)).last_hidden_state.flatten(0, 1)[moved["supervised"]]
        F.cross_entropy(model.lm_head(hidden).float(), moved["targets"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(*counted)
    return clock.result()


def trl(setting: Setting) -> dict:
    """TRL's SFTTrainer on the same documents, packed best-fit as it does; flash attention where it is installed."""
    import importlib.util

    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tokens import byte_tokenizer

    clock, found = Clock(setting), setting.documents()
    row = setting.rows * setting.length * 0.99  # what best-fit fills; see benchmarks/README.md
    squares = row * sum(len(d) ** 2 for d in found) / sum(map(len, found))

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            clock.step(int(row), squares)

    torch.manual_seed(0)
    flash = bool(importlib.util.find_spec("flash_attn"))
    model = LlamaForCausalLM(setting.config()).to(torch.float32 if setting.tiny else torch.bfloat16)
    model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=model, train_dataset=Dataset.from_dict({"input_ids": found}), processing_class=byte_tokenizer(),
            callbacks=[Tick()],
            args=SFTConfig(
                output_dir=folder, max_length=setting.length, packing=True, packing_strategy="bfd", learning_rate=1e-5,
                max_steps=setting.steps + WARM_UP, per_device_train_batch_size=setting.rows, optim="adamw_torch_fused",
                use_cpu=setting.tiny, bf16=not setting.tiny, logging_steps=10, save_strategy="no", report_to=[],
                disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=not setting.tiny,
                use_liger_kernel=bool(importlib.util.find_spec("liger_kernel")),
            ),
        ).train()  # fmt: skip
    return clock.result()


def longest(setting: Setting) -> dict:
    """One row that is one document, with everything on that makes room."""
    import attrs

    import posttrain

    keys = {field.name for field in attrs.fields(posttrain.HFModel)}
    wanted = {"activation_checkpointing": True, "offload_activations": True, "tiled_mlp": 8}
    setting.rows, setting.packing = 1, False
    return posttrain_(setting, **{name: value for name, value in wanted.items() if name in keys}) | {
        "on": [name for name in wanted if name in keys]
    }


def measure(name: str, options: list[str]) -> dict | str:
    """Run one candidate in a process of its own; return what it measured, or the last line of its error."""
    done = subprocess.run([sys.executable, __file__, "--one", name, *options], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["killed, as when memory runs out"])[-1][:120]
    return json.loads(done.stdout.splitlines()[-1])


def compare(chosen: argparse.Namespace, options: list[str]) -> None:
    """Print the table of candidates."""
    found: dict[str, list[dict]] = {name: [] for name in CANDIDATES}
    failed: dict[str, str] = {}
    for _ in range(chosen.rounds):
        for name in CANDIDATES:
            result = measure(name, options) if name not in failed else failed[name]
            if isinstance(result, str):
                failed[name] = result
            else:
                found[name].append(result)
    rates = {name: statistics.median(r["rate"] for r in results) for name, results in found.items() if results}
    print("| candidate | tokens/s | MFU | peak GiB | against bare |\n|---|---|---|---|---|")
    for name, results in found.items():
        if not results:
            print(f"| {name} | does not run here: {failed[name]} | | | |")
            continue
        mfu = f"{statistics.median(r['mfu'] for r in results):.1%}" if results[0]["mfu"] else "-"
        against = f"{rates[name] / rates['bare'] - 1:+.1%}" if "bare" in rates else "-"
        print(f"| {name} | {rates[name]:.0f} | {mfu} | {max(r['gib'] for r in results):.2f} | {against} |", flush=True)


def search(chosen: argparse.Namespace) -> None:
    """Print what fits, doubling the row until one does not, then halving the gap three times."""
    step, fits, fails, length = 256 if chosen.tiny else 8192, 0, None, 256 if chosen.tiny else 32768
    print("\n| one document of | tokens/s | MFU | peak GiB | on |\n|---|---|---|---|---|")
    for _ in range(3 if chosen.tiny else 12):
        options = ["--steps", "1", "--length", str(length), *(["--tiny"] if chosen.tiny else [])]
        found = measure("longest", options)
        if isinstance(found, str):
            print(f"| {length} | does not fit: {found} | | | |", flush=True)
            fails = length
        else:
            mfu = f"{found['mfu']:.1%}" if found["mfu"] else "-"
            print(
                f"| {length} | {found['rate']:.0f} | {mfu} | {found['gib']:.2f} | {', '.join(found['on'])} |",
                flush=True,
            )
            fits = length
        following = fits * 2 if fails is None else (fits + fails) // 2 // step * step
        if following in (fits, fails) or (fails and fails - fits <= fails // 8):
            return
        length = following


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--steps", type=int, default=20, help="measured, after 3 to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2, help="packed rows of a step")
    parser.add_argument("--length", type=int, help="of a row (4096; tiny: 256)")
    parser.add_argument("--compile", action="store_true", help="compile each layer, of posttrain and the bare loop")
    parser.add_argument("--longest", action="store_true", help="search for the longest row, too")
    parser.add_argument("--one", choices=(*CANDIDATES, "longest"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.length = chosen.length or (256 if chosen.tiny else 4096)
    if chosen.one:
        setting = Setting(chosen.tiny, chosen.steps, chosen.rows, chosen.length, chosen.compile)
        run = {"posttrain": posttrain_, "bare": bare, "trl": trl, "longest": longest}[chosen.one]
        print(json.dumps(run(setting)))
        return
    import torch

    device = platform.machine() if chosen.tiny else torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    print(f"{device}, torch {torch.__version__}, commit {commit.strip()}, {chosen.rows} rows of {chosen.length}\n")
    options = ["--steps", str(chosen.steps), "--rows", str(chosen.rows), "--length", str(chosen.length)]
    compare(chosen, options + ["--tiny"] * chosen.tiny + ["--compile"] * chosen.compile)
    if chosen.longest:
        search(chosen)


if __name__ == "__main__":
    main()
