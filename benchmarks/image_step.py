"""Tokens and images per CPU second of a training step with images: posttrain, packed, and TRL, padded.

    python benchmarks/image_step.py [--steps 6] [--rounds 3] [--only qwen2_5_vl] [--train language projector]

A model of random weights is made and saved with its processor, and so are chats with one to three JPEG files each. A step
is the same four chats for both, in the same order, read from these files as users have them read; replies are trained.
Tokens are those that are not padding, the placeholders of images among them. One thread, float32, every candidate in a
process of its own, in alternating rounds; the table gives medians. `loss` is that of the first step, which both must
agree on. TRL is found where it is installed; processors are those on Pillow, since torchvision is not needed.
"""

import argparse
import json
import platform
import random
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_step import ROOT, Clock, measure

sys.path.insert(0, str(ROOT / "tests" / "support"))

CANDIDATES = ("posttrain", "trl")
CHATS = 4
"""In a step."""
VOCABULARY = 16_000
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 48,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = ("qwen2_5_vl", "idefics3")
PARTS = ("language", "projector", "tower")
TEMPLATE = """{% for m in messages %}{{ '\\n<|im_start|>' + m.role + '\\n' }}{% if m.content is string %}{{ m.content }}\
{% else %}{% for p in m.content %}{{ 'PLACE' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<|im_end|>\
{% endfor %}{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"""
"""Nothing follows the end of a turn, which TRL would train as well."""


def config(family: str, tokenizer: Any) -> Any:
    """Return the configuration of a model of some 30 million parameters."""
    import transformers

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    if family == "qwen2_5_vl":
        vision = {
            "depth": 8, "hidden_size": 320, "intermediate_size": 864, "num_heads": 8, "out_hidden_size": 384,
            "fullatt_block_indexes": [3, 7],
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 8, 8]}
        return transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=True,
            image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
    vision = {
        "hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 8,
        "image_size": 192, "patch_size": 16,
    }  # fmt: skip
    return transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, scale_factor=2, tie_word_embeddings=True,
        image_token_id=token("<image>"), pad_token_id=token("<|pad|>"),
    )  # fmt: skip


def make(family: str, folder: Path) -> None:
    """Save a model with random weights, its processor and its tokenizer, as downloaded ones are."""
    import torch
    import transformers
    import vision

    from posttrain.blocks.images.loading import class_of

    tokenizer = vision.tokenizer_of(family)
    tokenizer.chat_template = TEMPLATE.replace("PLACE", vision.PLACES[family])
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config(family, tokenizer)).save_pretrained(folder)
    if family == "qwen2_5_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        made = class_of("Qwen2_5_VLProcessor")(Qwen2VLImageProcessorPil(), tokenizer)
    else:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        images = Idefics3ImageProcessorPil(size={"longest_edge": 384}, max_image_size={"longest_edge": 192})
        made = class_of("Idefics3Processor")(images, tokenizer, image_seq_len=36)
    made.chat_template = tokenizer.chat_template
    made.save_pretrained(folder)


def write(folder: Path, chats: int) -> None:
    """Write chats with one to three images; replies are as skewed as those of real chats, a median of 100 tokens."""
    import vision

    chance = random.Random(0)
    rows = []
    for n in range(chats):
        names = [f"{n}-{k}.jpg" for k in range(chance.choices([1, 2, 3], [6, 2, 1])[0])]
        for name in names:
            size = chance.randint(112, 392), chance.randint(112, 392)
            vision.picture(chance.randrange(1 << 30), size).save(folder / name)
        reply = min(1500, int(chance.lognormvariate(4.6, 0.9)) + 8)
        question, answer = (text(chance, length) for length in (chance.randint(20, 120), reply))
        rows.append({"question": question, "answer": answer, "images": names})
    (folder / "chats.json").write_text(json.dumps(rows))
    lines = (json.dumps({"messages": [asked(row), *answered(row)]}) for row in rows)
    (folder / "chats.jsonl").write_text("".join(f"{line}\n" for line in lines))


def text(chance: random.Random, length: int) -> str:
    """Return random letters, of which each is a token."""
    return "".join(chance.choices(string.ascii_lowercase + " ", k=length))


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """Return the question of a chat, behind its images."""
    parts = [{"type": "image", "path": name} for name in row["images"]]
    return {"role": "user", "content": [*parts, {"type": "text", "text": row["question"]}]}


def answered(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the reply of a chat."""
    return [{"role": "assistant", "content": row["answer"]}]


def posttrain_(folder: Path, steps: int, parts: list[str]) -> dict[str, Any]:
    """The trainer as users call it, from files on, but for which chats make a step."""
    import attrs

    import posttrain
    from posttrain.blocks.data.loader import MapLoader

    class InOrder(MapLoader):
        """Four chats in their order make a packed row."""

        def plan(self, epoch: int) -> list[list[int]]:
            return [list(range(at, at + CHATS)) for at in range(0, len(self.examples), CHATS)]

    @posttrain.block("data", "in_order")
    class Data(posttrain.SFTData):
        def build(self, *given: Any, **more: Any) -> Any:
            made = super().build(*given, **more)
            keys = {f.name: getattr(made.train, f.name) for f in attrs.fields(MapLoader) if f.init}
            return attrs.evolve(made, train=InOrder(**keys))

    clock, losses, images = Clock(), [], []

    @posttrain.before("trainer.count")
    def tick(trainer: Any, batches: Any, position: Any, loss: Any, lr: Any) -> None:
        losses.append(float(loss))
        clock.step(sum(batch["tokens"] for batch in batches))
        images.append(sum(batch.counted["images"] for batch in batches))

    with tempfile.TemporaryDirectory() as out:
        posttrain.SFTTrainer(
            model=posttrain.HFModel(name_or_path=str(folder), train=parts),
            data=Data(sources=[str(folder / "chats.jsonl")], max_length=8192, cache_dir=Path(out) / "cache"),
            optimizer=posttrain.AdamW(lr=1e-5, weight_decay=0.0), scheduler=posttrain.Constant(), checkpoint=[],
            logger=[posttrain.JSONL()], micro_batch_size=1, max_steps=steps + 3, output_dir=Path(out) / "run",
            accelerator="cpu",
        ).train(callbacks=[tick])  # fmt: skip
    return clock.result() | {"loss": losses[0], "images": sum(images[3:]) / clock.spent}


def trl(folder: Path, steps: int, parts: list[str]) -> dict[str, Any]:
    """TRL's SFTTrainer with its own collator of images, on the same chats."""
    import torch
    from datasets import Dataset, Image, List
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from posttrain.blocks.images.loading import class_of
    from posttrain.blocks.models.vision.parts import parts_of

    clock, tokens, images, losses = Clock(), [], [], []

    class Tick(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.step(tokens[state.global_step - 1])

    class SameChats(SFTTrainer):
        def _get_train_sampler(self, *more: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            tokens.append(int(inputs["attention_mask"].sum()))
            shown.append(inputs["input_ids"].numel())
            loss = super().compute_loss(model, inputs, *more, **named)
            losses.append(float(loss.detach()))
            return loss

    shown: list[int] = []
    chats = json.loads((folder / "chats.json").read_text())
    rows = Dataset.from_list([
        {"prompt": [{"role": "user", "content": row["question"]}], "completion": answered(row),
         "images": [str(folder / name) for name in row["images"]]}
        for row in chats
    ]).cast_column("images", List(Image()))  # fmt: skip
    saved = json.loads((folder / "processor_config.json").read_text())
    processor = class_of(saved["processor_class"]).from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    where = parts_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(where.of(name) in parts)
    with tempfile.TemporaryDirectory() as out:
        SameChats(
            model=model, train_dataset=rows, processing_class=processor, callbacks=[Tick()],
            args=SFTConfig(
                output_dir=out, max_length=None, max_steps=steps + 3, per_device_train_batch_size=CHATS,
                learning_rate=1e-5, lr_scheduler_type="constant", optim="adamw_torch_fused", use_cpu=True, bf16=False,
                logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, gradient_checkpointing=False,
                dataloader_pin_memory=False,
            ),
        ).train()  # fmt: skip
    images = sum(len(row["images"]) for row in chats[3 * CHATS : (steps + 3) * CHATS])
    real = sum(tokens[3:]) / sum(shown[3:])
    return clock.result() | {"loss": losses[0], "images": images / clock.spent, "real": real}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=FAMILIES)
    parser.add_argument("--train", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--one", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        run = {"posttrain": posttrain_, "trl": trl}[chosen.one]
        print(json.dumps(run(chosen.folder, chosen.steps, chosen.train)))
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, commit {commit}\n")
    heads = ["tok/CPU s", "images/CPU s", "peak MB", "loss"]
    print(f"| model | trained | {' | '.join(heads)} | posttrain / trl | padded batches are real |")
    print("|---|---|" + "---|" * (len(heads) + 2))
    for family in [chosen.only] if chosen.only else FAMILIES:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            make(family, folder)
            write(folder, CHATS * (chosen.steps + 6))
            options = ["--folder", made, "--steps", str(chosen.steps), "--train", *chosen.train]
            found: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
            for _ in range(chosen.rounds):
                for name in CANDIDATES:
                    if (result := measure(__file__, name, *options)) is not None:
                        found[name].append(result)
        print(f"| {family} | {', '.join(chosen.train)} | {line(found)} |", flush=True)


def line(found: dict[str, list[dict[str, float]]]) -> str:
    """Return what was measured as cells of a table, of both candidates in each."""

    def median(name: str, what: str) -> float | None:
        return statistics.median(result[what] for result in found[name]) if found[name] else None

    cells = []
    for what, digits in (("rate", 0), ("images", 2), ("mb", 0), ("loss", 5)):
        values = (median(name, what) for name in CANDIDATES)
        cells.append(" / ".join("-" if value is None else f"{value:.{digits}f}" for value in values))
    ours, theirs, real = median("posttrain", "rate"), median("trl", "rate"), median("trl", "real")
    cells += [f"{ours / theirs:.2f}", f"{real:.1%}"] if ours and theirs and real else ["-", "-"]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
