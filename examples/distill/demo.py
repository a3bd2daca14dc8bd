"""See models become cheaper to serve: a small base model, SwiftKV and a speculator for it, and what each of them saves.

The base model learns the demo's skills, and answers in whole sentences: drafts save most where text is easy to guess.
"""

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
from posttrain.blocks.models.documents.attention import CACHE
from posttrain.blocks.models.speculator.network import load_speculator
from posttrain.blocks.models.speculator.speculate import Drafts, speculate
from posttrain.blocks.models.swiftkv.config import cache_bytes, prefill_flops
from posttrain.blocks.models.swiftkv.modeling import start_from_teacher

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES / "demo"))
import demo  # noqa: E402
import make_data  # noqa: E402

FOLDER = Path("runs/distill")
BASE = FOLDER / "base" / "huggingface"
SENTENCES = {
    "Spell": "Spelled backwards it is {}.",
    "Sort": "In alphabetical order they are {}.",
    "What": "The last one is {}.",
}
"""First word of a question -> how the answer is put."""
WORDS = 40
"""Tokens of the longest answer, and some more."""
TOKENS = 400
"""Of the prompt whose cost is counted."""
console = Console(highlight=False)


def data(**sizes: int) -> None:
    """Write the demo's chats, tokenizer and model, with answers in whole sentences."""
    folder = FOLDER / "data"
    make_data.make(folder, **sizes)
    for name in ("train", "test"):
        file = folder / f"{name}.jsonl"
        chats = [json.loads(line) for line in file.read_text().splitlines()]
        for chat in chats:
            question, answer = chat["messages"]
            answer["content"] = SENTENCES[question["content"].split()[0]].format(answer["content"])
        file.write_text("\n".join(map(json.dumps, chats)) + "\n")


def train(title: str, recipe: Path, overrides: list[str]) -> float:
    """Run a recipe; return its seconds."""
    console.print(title)
    began = time.perf_counter()
    run = posttrain.load(recipe, ["resume=never", *overrides]).train()
    if run.status != "finished":
        sys.exit(f"stopped after {run.step} of {run.max_steps} steps: {run.stop}")
    return time.perf_counter() - began


def loaded(folder: Path) -> Any:
    """Return a model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prefill(model: Any, tokens: int) -> tuple[int, int]:
    """Return the operations that a prompt takes up to its first new token, and the bytes it leaves in the cache."""
    model.set_attn_implementation("eager")  # its products are counted like all others
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)[CACHE]
    kept = [x for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values)]
    return counter.get_total_flops(), sum(x.numel() * x.element_size() for x in kept)


def same(ours: list[str], theirs: list[str]) -> float:
    """Return the share of equal replies."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def main(overrides: list[str], **sizes: int) -> dict[str, Any]:
    """Train all three, print what was measured, and return it."""
    from transformers import AutoTokenizer

    if not (FOLDER / "data" / "model").exists():
        data(**sizes)
    places = [
        f"model.name_or_path={FOLDER}/data/model", f"data.sources=[{FOLDER}/data/train.jsonl]",
        f"data.eval_sources=[{FOLDER}/data/test.jsonl]", f"output_dir={FOLDER}/base", "max_steps=600", "eval_every=200",
    ]  # fmt: skip
    overridden = [*places, *overrides]
    seconds = [
        train("[bold]1. a base model[/], from random weights", EXAMPLES / "demo" / "recipe.yaml", overridden),
        train("[bold]2. SwiftKV[/]: upper layers share the keys and values of one lower layer",
              EXAMPLES / "swiftkv" / "recipe.yaml", overrides),
        train("[bold]3. a speculator[/]: heads draft the next tokens",
              EXAMPLES / "mlp_speculator" / "recipe.yaml", overrides),
    ]  # fmt: skip

    tests = [json.loads(line)["messages"] for line in (FOLDER / "data" / "test.jsonl").read_text().splitlines()]
    questions, right = [chat[0]["content"] for chat in tests], [chat[1]["content"] for chat in tests]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    teacher, student, before = loaded(BASE), *(loaded(FOLDER / "swiftkv" / "huggingface") for _ in range(2))
    start_from_teacher(before)
    models = {"base": teacher, "before": before, "after": student}
    said = {name: demo.answers(model, tokenizer, questions, WORDS) for name, model in models.items()}
    found = {
        "exact": [same(replies, right) for replies in said.values()],
        "agreement": [same(replies, said["base"]) for replies in said.values()],
        "costs": [prefill(model, TOKENS) for model in (teacher, student)],
        "formulas": (prefill_flops(student.config, TOKENS), TOKENS * cache_bytes(student.config, 4)),
        "drafts": drafted(teacher, tokenizer, questions),
        "questions": len(questions),
        "seconds": seconds,
    }
    console.print(report(found))
    return found


def drafted(teacher: Any, tokenizer: Any, questions: list[str]) -> Drafts:
    """Generate with drafts; every reply must be what the base model says by itself."""
    speculator = load_speculator(FOLDER / "speculator" / "huggingface").eval()
    total = Drafts([0] * speculator.config["n_predict"])
    for question in questions:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        found, drafts = speculate(teacher, speculator, ids, WORDS)
        plain = teacher.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=WORDS, do_sample=False)
        assert found.tolist() == plain[0, ids.shape[1] :].tolist(), question
        total.add(drafts)
    return total


def report(found: dict[str, Any]) -> Table:
    """Return what was measured, and what the formulas say."""
    table = Table("", "base", "SwiftKV, untrained", "SwiftKV", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_row(f"exactly right, of {found['questions']} held out", *(f"{share:.1%}" for share in found["exact"]))
    table.add_row("same reply as the base model", *(f"{share:.1%}" for share in found["agreement"]))
    (flops, held), (less, fewer) = found["costs"]
    expected, bytes_ = found["formulas"]
    table.add_row(
        f"operations, prompt of {TOKENS} tokens", f"{flops / 1e6:.0f} M", "", f"{less / 1e6:.0f} M ({less / flops:.0%})"
    )
    table.add_row("  by the formula", "", "", f"{expected / 1e6:.0f} M")
    table.add_row("bytes in its cache", f"{held:,}", "", f"{fewer:,} ({fewer / held:.0%})")
    table.add_row("  by the formula", "", "", f"{bytes_:,}")
    table.add_section()
    drafts = found["drafts"]
    table.add_row("drafts accepted, head by head", ", ".join(f"{n / drafts.steps:.0%}" for n in drafts.accepted))
    table.add_row("tokens per pass, with drafts", f"{drafts.tokens_per_step:.2f}")
    table.add_row("replies unchanged by drafts", f"{found['questions']} of {found['questions']}")
    table.add_section()
    table.add_row("seconds of training", f"{found['seconds'][0]:.0f}", "", f"{found['seconds'][1]:.0f}")
    table.add_row("  of the speculator", f"{found['seconds'][2]:.0f}")
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
