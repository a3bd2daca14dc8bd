"""Single replies with verdicts, with images: each reply, and each reply of another row, is what it is alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vision
from test_vision import alone, ask, folder, pictures, reply, written
from toy import losses

import posttrain
from posttrain import HFModel, HFTokenizer, KTOTrainer, UnpairedData

__all__ = ["folder"]  # a fixture
EVERY = [f if f in ("qwen3_vl", "gemma3") else pytest.param(f, marks=pytest.mark.slow) for f in vision.FAMILIES]


def verdicts(root: Path, drawn: bool = True) -> list[dict[str, Any]]:
    """Prompts with one, no and two images, and an image in a reply."""
    a, b, c, d, _ = pictures(root)
    picture = {"role": "assistant", "content": [{"type": "text", "text": "like "}, {"type": "image", "path": d.name}]}
    chats = [
        [ask(a, "what is it?"), reply("a cat")],
        [ask("text only"), reply("yes, it is")],
        [ask(b, " and ", c), reply("two")],
        [ask("draw"), picture if drawn else reply("no")],
    ]
    return [{"messages": chat, "label": bool(n % 2)} for n, chat in enumerate(chats)]


@pytest.mark.parametrize("family", EVERY)
def test_replies_and_those_of_other_rows_are_what_they_are_alone(folder: Any, tmp_path: Path, family: str) -> None:
    block = HFModel(name_or_path=str(folder(family)))
    tokenizer = HFTokenizer().build(block)
    plain = (
        tokenizer.images.expansion((64, 64)).text.replace(tokenizer.images.token, "") == ""
    )  # else `alone` counts it
    rows = verdicts(tmp_path, drawn=plain)
    data = UnpairedData(sources=[str(written(tmp_path, rows))], max_length=1024, cache_dir=tmp_path / "cache")
    loaders = data.build(tokenizer, 1, 0, 1, 0)
    (batch,) = loaders.train.one_pass()
    assert loaders.ledger["total"]["images"] == batch.counted["images"] == 6 + 2 * plain  # with each reply
    network: Any = block.build(None).eval()  # type: ignore[arg-type]
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder(family)).eval()
    chats = [row["messages"] for row in rows]
    mixed = [[*chat[:-1], chats[(n + 1) % len(chats)][-1]] for n, chat in enumerate(chats)]
    with torch.no_grad():
        for given, expected in ((batch, chats), (batch["others"], mixed)):
            found = network(given, "log_probs")
            sums = torch.zeros(len(chats)).index_add(0, given["document"], found)
            wanted = torch.stack([-alone(tokenizer, theirs, {"messages": chat}, tmp_path) for chat in expected])
            torch.testing.assert_close(sums.sort().values, wanted.sort().values, rtol=1e-5, atol=1e-5)


def test_kto_with_images_trains_the_same_however_a_step_is_cut(folder: Any, tmp_path: Path) -> None:
    root = tmp_path / "rows"
    root.mkdir()
    source = str(written(root, verdicts(root)))
    for name, keys in (("whole", {"micro_batch_size": 4}), ("cut", {"gradient_accumulation_steps": 4})):
        KTOTrainer(
            model=HFModel(name_or_path=str(folder("llava"))), max_steps=3, accelerator="cpu", logger=[posttrain.JSONL()],
            data=UnpairedData(sources=[source], max_length=256, packing=False, cache_dir=tmp_path / "cache"),
            optimizer=posttrain.AdamW(lr=1e-2), output_dir=tmp_path / name, checkpoint=[], log_every=1, **keys,
        ).train()  # fmt: skip
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "cut"), rel=1e-4)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
