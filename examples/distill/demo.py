"""Make the demo's model cheaper to serve, before your eyes: SwiftKV and a speculator, and what each of them saves."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import posttrain
from posttrain.blocks.speculate import Drafts, speculate
from posttrain.blocks.speculator_network import load_speculator
from posttrain.blocks.swiftkv import cache_bytes, prefill_flops
from posttrain.blocks.swiftkv_modeling import start_from_teacher

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES / "demo"))
import demo  # noqa: E402
import make_data  # noqa: E402

FOLDER = Path("runs/demo")
BASE = FOLDER / "run" / "huggingface"
console = Console(highlight=False)


def base(overrides: list[str]) -> None:
    """Train the base model, unless `make demo` has left one."""
    if BASE.exists():
        console.print(f"[bold]1. the base model[/] is there: {BASE}")
        return
    console.print("[bold]1. the base model[/], from random weights")
    if not (FOLDER / "data" / "model").exists():
        make_data.make(FOLDER / "data")
    posttrain.load(EXAMPLES / "demo" / "recipe.yaml", ["resume=never", *overrides]).train()


def loaded(folder: Path) -> Any:
    """Return a model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prefill(model: Any, tokens: int) -> tuple[int, int]:
    """Return the operations that a prompt takes up to its first new token, and the bytes it leaves in the cache."""
    model.set_attn_implementation("eager")  # its products are counted like all others
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values
    kept = [x for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values)]
    return counter.get_total_flops(), sum(x.numel() * x.element_size() for x in kept)


def same(ours: list[str], theirs: list[str]) -> float:
    """Return the share of equal replies."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def main(overrides: list[str]) -> None:
    """Train all three, and print what was measured."""
    from transformers import AutoTokenizer

    began = time.perf_counter()
    base(overrides)
    console.print("[bold]2. SwiftKV[/]: upper layers learn to share keys and values of one lower layer")
    posttrain.load(EXAMPLES / "swiftkv" / "recipe.yaml", ["resume=never", *overrides]).train()
    console.print("[bold]3. a speculator[/]: heads learn to draft the next tokens")
    posttrain.load(EXAMPLES / "mlp_speculator" / "recipe.yaml", ["resume=never", *overrides]).train()

    tests = [json.loads(line)["messages"] for line in (FOLDER / "data" / "test.jsonl").read_text().splitlines()]
    questions, right = [chat[0]["content"] for chat in tests], [chat[1]["content"] for chat in tests]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    teacher, student = loaded(BASE), loaded(FOLDER / "swiftkv" / "huggingface")
    before = loaded(FOLDER / "swiftkv" / "huggingface")
    start_from_teacher(before)
    said = {name: demo.answers(model, tokenizer, questions)
            for name, model in (("base", teacher), ("before", before), ("after", student))}  # fmt: skip
    drafts = drafted(teacher, tokenizer, questions)
    console.print(report(said, right, teacher, student, drafts))
    console.print(f"all of it took {time.perf_counter() - began:.0f} s")


def drafted(teacher: Any, tokenizer: Any, questions: list[str]) -> Drafts:
    """Generate with drafts; every reply must be what the base model says by itself."""
    speculator = load_speculator(FOLDER / "speculator" / "huggingface").eval()
    total = Drafts([0] * speculator.config["n_predict"])
    for question in questions:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        found, drafts = speculate(teacher, speculator, ids, 10)
        plain = teacher.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert found.tolist() == plain[0, ids.shape[1] :].tolist(), question
        total.add(drafts)
    return total


def report(said: dict[str, list[str]], right: list[str], teacher: Any, student: Any, drafts: Drafts) -> Table:
    """Return what was measured, and what the formulas say."""
    table = Table("", "base model", "SwiftKV untrained", "SwiftKV", box=box.SIMPLE_HEAD, pad_edge=False)
    shares = [f"{same(replies, right):.1%}" for replies in said.values()]
    table.add_row(f"exactly right, of {len(right)} held-out questions", *shares)
    agreement = [f"{same(replies, said['base']):.1%}" for replies in said.values()]
    table.add_row("the same reply as the base model", *agreement)
    tokens = 400
    (flops, bytes_), (less, fewer) = prefill(teacher, tokens), prefill(student, tokens)
    expected = prefill_flops(student.config, tokens)
    table.add_row(f"operations of a prompt of {tokens} tokens", f"{flops / 1e6:.1f} M", "", f"{less / 1e6:.1f} M")
    table.add_row("  as the formula says", "", "", f"{expected / 1e6:.1f} M ({less / flops:.0%})")
    table.add_row("bytes of keys and values per token", f"{bytes_ // tokens:,}", "", f"{fewer // tokens:,}")
    table.add_row("  as the formula says", "", "", f"{cache_bytes(student.config, 4):,} ({fewer / bytes_:.0%})")
    table.add_section()
    rates = ", ".join(f"{count / drafts.steps:.0%}" for count in drafts.accepted)
    table.add_row("drafts accepted, head by head", rates)
    table.add_row("tokens per pass of the base model", f"{drafts.tokens_per_step:.2f}")
    table.add_row("  every reply equal to that without drafts", "yes")
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
