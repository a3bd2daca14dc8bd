"""A tiny model of images and text learns to see: from random weights to right answers about drawn figures.

Beside it, on the other core, the same model is trained with its tower frozen as it began: what the tower learns is the
difference.
"""

import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import figures
from rich import box
from rich.console import Console
from rich.table import Table

import posttrain

FOLDER = Path("runs/vision")
RECIPE = Path(__file__).parent / "recipe.yaml"
KINDS = ("how many", "what color", "which shape", "where")
FROZEN = ["model.train=[language, projector]", f"output_dir={FOLDER / 'frozen'}"]
console = Console(highlight=False)


def questions(count: int) -> list[dict]:
    """Return every question about some held-out pictures, with its answer."""
    found = []
    for line in (FOLDER / "data" / "test.jsonl").read_text().splitlines()[:count]:
        messages = json.loads(line)["messages"]
        image = base64.b64decode(messages[0]["content"][0]["base64"])
        for asked, answer in zip(messages[::2], messages[1::2], strict=True):
            found.append({"image": image, "question": asked["content"][-1]["text"], "right": answer["content"]})
    return found


def answers(folder: Path, asked: list[dict]) -> list[str]:
    """Return what an exported model says, greedily: with transformers alone, as anybody would use it."""
    import transformers
    from PIL import Image

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    found = []
    for begin in range(0, len(asked), 100):
        batch = asked[begin : begin + 100]
        content = [[{"type": "image"}, {"type": "text", "text": one["question"]}] for one in batch]
        chats = [[{"role": "user", "content": parts}] for parts in content]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        images = [[Image.open(io.BytesIO(one["image"])).convert("RGB")] for one in batch]
        given = processor(text=texts, images=images, padding=True, return_tensors="pt")
        said = model.generate(**given, max_new_tokens=4, do_sample=False)[:, given["input_ids"].shape[1] :]
        found += [text.strip() for text in processor.tokenizer.batch_decode(said, skip_special_tokens=True)]
    return found


def shares(asked: list[dict], said: list[str]) -> list[float]:
    """Return the share of exact answers to each kind of question, and to all."""
    right = [one["right"] == answer for one, answer in zip(asked, said, strict=True)]
    by_kind = [[r for r, one in zip(right, asked, strict=True) if one["question"].startswith(k)] for k in KINDS]
    return [sum(found) / max(1, len(found)) for found in [*by_kind, right]]


def picture(asked: list[dict], said: list[str], file: Path, columns: int = 6) -> None:
    """Draw some held-out pictures with what was asked and said; a wrong answer is red, with the right one behind it."""
    from PIL import Image, ImageDraw

    side, width, height = 96, 190, 150
    rows = -(-len(asked) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (one, answer) in enumerate(zip(asked, said, strict=True)):
        x, y = number % columns * width + 8, number // columns * height + 8
        small = Image.open(io.BytesIO(one["image"])).convert("RGB")
        sheet.paste(small.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + side + 4), one["question"], "black")
        wrong = answer != one["right"]
        pen.text(
            (x, y + side + 18), f"{answer} (right: {one['right']})" if wrong else answer, "red" if wrong else "green"
        )
    sheet.save(file)


def train(overrides: list[str]) -> float:
    """Train once, and return the seconds that it took."""
    begin = time.perf_counter()
    posttrain.load(RECIPE, overrides).train()
    return time.perf_counter() - begin


def main(overrides: list[str]) -> list[float]:
    """Make the data, train both models, and show what they say; return the shares of right answers of all."""
    if not (FOLDER / "data" / "model").exists():
        figures.make(FOLDER / "data")
    for name in ("untrained", "frozen"):
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
    with (FOLDER / "frozen.log").open("w") as log:
        control = subprocess.Popen([sys.executable, __file__, "train", *overrides, *FROZEN], stdout=log, stderr=log)
    try:
        asked = questions(400)
        untrained = [*overrides, "max_steps=1", "optimizer.lr=1e-12", f"output_dir={FOLDER / 'untrained'}"]
        posttrain.load(RECIPE, untrained).train()
        seconds = train(overrides)
        if control.wait():
            raise SystemExit((FOLDER / "frozen.log").read_text()[-2000:])
    finally:
        control.kill()
    folders = {"untrained": "untrained", "tower frozen at random": "frozen", "all trained": "run"}
    title = "exactly right, of all questions about 400 held-out pictures"
    table = Table(title, *KINDS, "all", box=box.SIMPLE_HEAD, pad_edge=False)
    totals = []
    for label, name in folders.items():
        said = answers(FOLDER / name / "huggingface", asked)
        found = shares(asked, said)
        table.add_row(label, *(f"{share:.1%}" for share in found))
        totals.append(found[-1])
    one_each = list({one["image"]: number for number, one in enumerate(asked)}.values())[:24]
    picture([asked[n] for n in one_each], [said[n] for n in one_each], FOLDER / "answers.png")
    console.print(table)
    console.print(f"trained in {seconds:.0f} s; what it saw and said: {FOLDER / 'answers.png'}")
    return totals


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2:])
    else:
        main(sys.argv[1:])
