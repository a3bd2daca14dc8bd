"""Draws pictures of coloured figures with questions about them, and makes a tiny model of images and text for them.

One to three figures stand in the quarters of a picture of 24 x 24 pixels. How many is asked, and of a single one also
color, shape and place.
"""

import base64
import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

COLORS = {
    "red": (230, 60, 50), "green": (70, 190, 80), "blue": (70, 110, 240), "yellow": (240, 210, 60),
    "purple": (170, 80, 210), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
NUMBERS = ("one", "two", "three")
SIDE, CELL = 24, 12
"""Pixels of a picture, and of a quarter of it."""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {% for p in m.content %}{% if p.type == 'image' %}<see> "
    "{% else %}{{ p.text }} {% endif %}{% endfor %}{% else %}<reply> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<reply> {% endif %}"
)
WORDS = (
    "how many figures are there ? what color is it which shape where", *COLORS, *SHAPES, *PLACES, *NUMBERS,
)  # fmt: skip


def draw(rng: random.Random):
    """Return a picture, and its figures as (color, shape, place); no two have the same color or the same shape."""
    from PIL import Image, ImageDraw

    count = rng.choice([1, 1, 1, 1, 2, 3])
    chosen = (rng.sample(list(known), count) for known in (COLORS, SHAPES, PLACES))
    figures = list(zip(*chosen, strict=True))
    ground = tuple(rng.randint(0, 60) for _ in range(3))
    big = Image.new("RGB", (SIDE * 4, SIDE * 4), ground)  # four times as large, for smooth edges
    pen = ImageDraw.Draw(big)
    for color, shape, place in figures:
        size = rng.uniform(8, 11)
        x, y = (PLACES[place][axis] * CELL + rng.uniform(0.5, CELL - 0.5 - size) for axis in (0, 1))
        shade = tuple(max(0, min(255, value + rng.randint(-25, 25))) for value in COLORS[color])
        figure(pen, shape, [4 * x, 4 * y, 4 * (x + size), 4 * (y + size)], shade)
    return big.resize((SIDE, SIDE), Image.Resampling.BOX), figures


def figure(pen, shape: str, box: list[float], color: tuple[int, ...]) -> None:
    """Draw one figure into a box."""
    left, top, right, bottom = box
    third = (right - left) / 3
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=color)
    else:
        pen.rectangle([left + third, top, right - third, bottom], fill=color)
        pen.rectangle([left, top + third, right, bottom - third], fill=color)


def questions(rng: random.Random, figures: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Return questions about some figures, in any order, with their answers; of several only how many there are."""
    found = [("how many figures are there ?", NUMBERS[len(figures) - 1])]
    if len(figures) == 1:
        ((color, shape, place),) = figures
        found += [("what color is it ?", color), ("which shape is it ?", shape), ("where is it ?", place)]
    return rng.sample(found, len(found))


def rows(seed: int, count: int) -> Iterator[dict]:
    """Yield rows as they stand in a file: a picture in base64, and questions about it with their answers."""
    rng = random.Random(seed)
    for _ in range(count):
        picture, figures = draw(rng)
        picture.save(file := io.BytesIO(), format="PNG")
        messages = []
        for asked, answer in questions(rng, figures):
            content = [{"type": "text", "text": asked}]
            if not messages:
                image = {"type": "image", "base64": base64.b64encode(file.getvalue()).decode()}
                content.insert(0, image)
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        yield {"messages": messages}


def prompts(seed: int, count: int) -> Iterator[dict]:
    """Yield pictures with one question each, and the answer in a column of its own, for a reward to compare with."""
    rng = random.Random(seed)
    for row in rows(seed, count):
        image, messages = row["messages"][0]["content"][0], row["messages"]
        asked, answer = rng.choice(list(zip(messages[::2], messages[1::2], strict=True)))
        yield {"prompt": [{"role": "user", "content": [image, asked["content"][-1]]}], "answer": answer["content"]}


def tokenizer():
    """Return a tokenizer of whole words, with the marks around an image that Gemma 3 knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for group in WORDS for word in group.split()})
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##")  # puts spaces between words
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE,
        additional_special_tokens=["<user>", "<reply>"],
        extra_special_tokens={"image_token": "<image>", "boi_token": "<see>", "eoi_token": "<seen>"},
    )  # fmt: skip


def model(folder: Path, patch: int = 6, hidden: int = 48, seen: int = 48, layers: int = 2) -> None:
    """Write the configuration of a tiny Gemma 3, its tokenizer and its processor; there are no weights.

    The tower's patches are averaged to one token for each picture. So what a patch is, and where, must have been found
    out before: by the tower, and not by the language model.
    """
    import transformers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = tokenizer()
    of_image = {name: words.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", "<image>"), ("boi_token_index", "<see>"), ("eoi_token_index", "<seen>"),
    )}  # fmt: skip
    text = {
        "vocab_size": len(words), "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": hidden // 4,
        "query_pre_attn_scalar": hidden // 4, "max_position_embeddings": 512, "layer_types": ["full_attention"] * 3,
        "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None,
        "initializer_range": 0.06,
    }  # fmt: skip
    tower = {
        "model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": patch, "hidden_size": seen,
        "intermediate_size": 3 * seen, "num_hidden_layers": layers, "num_attention_heads": 4, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=1, **of_image)
    config.save_pretrained(folder)
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = transformers.Gemma3Processor(images, words, chat_template=TEMPLATE, image_seq_length=1)
    processor.save_pretrained(folder)


def make(folder: Path, train: int = 20_000, test: int = 400) -> None:
    """Write everything into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 1, train), ("test", 2, test)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for row in rows(seed, count):
                print(json.dumps(row), file=file)
    model(folder / "model")


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/vision/data"))
