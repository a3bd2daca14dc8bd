"""What fits on one card, for shapes of known models: `python benchmarks/memory.py --table [--write docs/memory.md]`.

The shapes are numbers written here; nothing is fetched and nothing is trained. A step is traced at two lengths; at each
moment of it, what lies between and beyond is on a line, since what layers keep grows with each token alike.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3 0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "Llama 3.2 1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "vocab_size": 128256, "tie_word_embeddings": True},
    "SmolLM2 1.7B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "vocab_size": 49152,
                     "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": True},
    "Llama 3.2 3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "vocab_size": 128256, "tie_word_embeddings": True},
    "Qwen3 4B": {"model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "Mistral 7B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "vocab_size": 32768},
    "Llama 3.1 8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "vocab_size": 128256},
    "Qwen3 14B": {"model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40,
                  "num_attention_heads": 40, "head_dim": 128, "vocab_size": 151936},
    "Qwen3 32B": {"model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
                  "num_attention_heads": 64, "head_dim": 128, "vocab_size": 151936},
    "Llama 3.3 70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                      "num_attention_heads": 64, "vocab_size": 128256},
}  # fmt: skip
CARDS, LENGTHS, SPARE = (24, 48, 80), (8192, 16384), 0.1
LONGEST = 64 * 1024
BEGIN, END = "<!-- fits -->", "<!-- end of fits -->"


def settings() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return the keys of the model and of the trainer, by name."""
    import posttrain

    lora = {"lora": posttrain.LoRA(r=16), "dtype": "bfloat16"}
    return {
        "full": ({}, {}),
        "full, bf16-true": ({}, {"precision": "bf16-true", "optimizer": posttrain.AdamWBF16()}),
        "LoRA": (lora, {}),
        "QLoRA": ({**lora, "quantize": "nf4"}, {}),
    }


def traced(shape: dict[str, Any], model: dict[str, Any], more: dict[str, Any], length: int) -> Any:
    """Return what a step on one row of so many tokens takes."""
    import posttrain
    from posttrain.tools.tracing import trace

    config = {"model_type": "llama", "num_key_value_heads": 8, "max_position_embeddings": LONGEST, **shape}
    return trace(posttrain.SFTTrainer(
        model=posttrain.HFModel(
            name_or_path="shape", random_init=True, config=config, activation_checkpointing=True, **model
        ),
        data=posttrain.SFTData(sources=[posttrain.Source(name_or_path="none")], max_length=length),
        accelerator="cuda", devices=1, **more,
    ))  # fmt: skip


def fixed(shape: dict[str, Any], model: dict[str, Any], more: dict[str, Any]) -> tuple[int, int]:
    """Return the parameters of a shape, and the bytes that weights, gradients and optimizer take when all are trained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.for_model(**{"model_type": "llama", "num_key_value_heads": 8, **shape})
        hf = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in hf.parameters())
    return count, count * (0 if "lora" in model else 8 if more else 16)


def longest(shape: dict[str, Any], model: dict[str, Any], more: dict[str, Any]) -> tuple[list[str], int, int]:
    """Return the longest row that fits on each card, in words, the bytes at the shorter length, and the parameters."""
    short, long = LENGTHS
    count, least = fixed(shape, model, more)
    if least > max(CARDS) * (1 - SPARE) * 2**30:  # without one activation
        return ["-"] * len(CARDS), least, count
    first, second = (traced(shape, model, more, length) for length in LENGTHS)
    kept = first.kept + first.optimizer
    moments = [
        (kept + made + alive, (later - alive) / (long - short))  # at the shorter length, and for each token more
        for (made, alive), (_, later) in zip(first.moments, second.moments, strict=True)
    ]
    found = []
    for card in CARDS:
        room = card * (1 - SPARE) * 2**30
        fits = min((room - taken) / each + short if each > 0 else LONGEST * (taken < room) for taken, each in moments)
        tokens = int(min(fits, LONGEST)) // 1024
        found.append("-" if tokens < 1 else f"{tokens}k" if tokens < LONGEST // 1024 else f"{tokens}k or more")
    return found, max(taken for taken, _ in moments), count


def table(target: str | None, only: str | None = None) -> None:
    """Print the table, or put it between the marks of a page."""
    warnings.simplefilter("ignore")
    head = ["model", "parameters", "", "GiB at 8k", *(f"{card} GB" for card in CARDS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, shape in SHAPES.items() if only is None else [(only, SHAPES[only])]:
        for setting, (model, more) in settings().items():
            found, low, count = longest(shape, model, more)
            first = (name, f"{count / 1e9:.1f} B") if setting == "full" else ("", "")
            lines.append("| " + " | ".join([*first, setting, f"{low / 2**30:.1f}", *found]) + " |")
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    if target is not None:
        page = Path(target)
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text("\n".join([before + BEGIN, *lines, END + after]))
