"""Pairs with images: what both sides begin with, its images included, is computed once, and nothing changes by it."""

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import vision
from test_vision import ask, folder, pictures, reply, written

import posttrain
from posttrain import DPOTrainer, HFModel, HFTokenizer, PreferenceData

__all__ = ["folder"]  # a fixture


def pairs(root: Path) -> list[dict[str, Any]]:
    """Prompts with images, images in the replies, and two sides that differ in nothing but an image."""
    a, b, c, d, e = pictures(root)
    shown = [
        {"role": "assistant", "content": [{"type": "image", "path": p.name}, {"type": "text", "text": "it"}]}
        for p in (a, b)
    ]
    same = "c.png"
    vision.picture(77, (40, 24)).save(root / same)  # as large as a.png
    alike = [
        {"role": "assistant", "content": [{"type": "image", "path": p}, {"type": "text", "text": "it"}]}
        for p in ("0.png", same)
    ]
    return [
        {"prompt": [ask(a, "what is it?")], "chosen": [reply("a cat")], "rejected": [reply("a dog it is")]},
        {"prompt": [ask("text only")], "chosen": [reply("yes")], "rejected": [reply("no, never")]},
        {"prompt": [ask(b, " and ", c, d)], "chosen": [reply("three")], "rejected": [reply("two")]},
        {"prompt": [ask("draw")], "chosen": [shown[0]], "rejected": [shown[1]]},
        {"prompt": [ask("draw again")], "chosen": [alike[0]], "rejected": [alike[1]]},
        {"prompt": "<image>?", "chosen": "yes", "rejected": "no", "images": [e.name]},
    ]  # fmt: skip


def batch_of(family_folder: Path, root: Path) -> tuple[Any, Any]:
    tokenizer = HFTokenizer().build(HFModel(name_or_path=str(family_folder)))
    source = str(written(root, pairs(root)))
    data = PreferenceData(sources=[source], max_length=1024, cache_dir=root / "cache")
    loaders = data.build(tokenizer, 1, 0, 1, 0)
    (batch,) = loaders.train.one_pass()
    return batch, loaders


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_what_pairs_begin_with_is_computed_once(folder: Any, tmp_path: Path, family: str) -> None:
    batch, loaders = batch_of(folder(family), tmp_path)
    assert loaders.ledger["total"]["images"] == 14
    assert batch.branch is not None
    assert batch.branch.input_ids.numel() < batch.tokens
    network = HFModel(name_or_path=str(folder(family)), train=["language", "projector", "tower"]).build(None).eval()
    found = {}
    for name, given in (("branched", batch), ("whole", batch.but(branch=None))):
        network.zero_grad()
        log_probs = network(given, "log_probs")
        (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
        slopes = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found[name] = log_probs.detach(), slopes
    torch.testing.assert_close(found["branched"][0], found["whole"][0], rtol=1e-5, atol=2e-5)
    gap = (found["branched"][1] - found["whole"][1]).abs().max() / found["whole"][1].abs().max()
    assert float(gap) < 1e-5


def test_the_images_of_a_prompt_are_seen_once(folder: Any, tmp_path: Path) -> None:
    batch, _ = batch_of(folder("qwen2_5_vl"), tmp_path)
    assert batch.branch is not None
    once, whole = batch.branch.arguments["images"].values, batch.arguments["images"].values
    assert len(once["image_grid_thw"]) == 9
    assert len(whole(torch.device("cpu"))["image_grid_thw"]) == 14  # for a network that cannot branch, when it asks
    assert whole(torch.device("cpu")) is whole(torch.device("cpu"))


def test_dpo_with_images_trains_the_same_packed_or_not(folder: Any, tmp_path: Path) -> None:
    root = tmp_path / "rows"
    root.mkdir()
    source = str(written(root, pairs(root)))
    steps = {}
    for packing in (True, False):
        made = DPOTrainer(
            model=HFModel(name_or_path=str(folder("gemma3"))),
            data=PreferenceData(sources=[source], max_length=512, packing=packing, cache_dir=tmp_path / "cache"),
            max_steps=2, micro_batch_size=6, accelerator="cpu", logger=[posttrain.JSONL()], log_every=1,
            optimizer=posttrain.AdamW(lr=1e-2), output_dir=tmp_path / str(packing), checkpoint=[],
        )  # fmt: skip
        if packing:
            made = attrs.evolve(made, micro_batch_size=1)
        run = made.train()
        lines = (tmp_path / str(packing) / "metrics.jsonl").read_text().splitlines()
        steps[packing] = [json.loads(line)["loss"] for line in lines], run
    assert steps[True][0][0] == pytest.approx(0.693147, abs=1e-4)
    if len(steps[True][1].loaders.train.plan(0)) == 1:
        assert steps[True][0] == pytest.approx(steps[False][0], rel=1e-4)


@pytest.mark.parametrize("how", ["precomputed", "lora"])
def test_the_reference_sees_the_same_images(folder: Any, tmp_path: Path, how: str) -> None:
    root = tmp_path / "rows"
    root.mkdir()
    source = str(written(root, pairs(root)))
    if how == "lora":
        pytest.importorskip("peft")
    run = DPOTrainer(
        model=HFModel(name_or_path=str(folder("qwen3_vl")), lora=posttrain.LoRA(r=2) if how == "lora" else None),
        data=PreferenceData(sources=[source], max_length=512, cache_dir=tmp_path / "cache"),
        precompute_reference=how == "precomputed", max_steps=1, micro_batch_size=1, accelerator="cpu", logger=[],
        output_dir=tmp_path / "run", checkpoint=[],
    ).train()  # fmt: skip
    assert run.last["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(run.last["rewards/margin"]) < 1e-5


def test_a_reference_is_asked_again_about_another_image(folder: Any, tmp_path: Path) -> None:
    """Its tokens are those of the one before, and what was recorded of that one is in the cache."""
    image = tmp_path / "0.png"
    row = {"prompt": [ask(image, "what?")], "chosen": [reply("a cat")], "rejected": [reply("a dog it is")]}
    for seed in (1, 2):
        vision.picture(seed, (40, 24)).save(image)
        run = DPOTrainer(
            model=HFModel(name_or_path=str(folder("qwen3_vl"))), precompute_reference=True, max_steps=1,
            data=PreferenceData(sources=[str(written(tmp_path, [row]))], max_length=512, cache_dir=tmp_path / "cache"),
            accelerator="cpu", logger=[], output_dir=tmp_path / f"run-{seed}", checkpoint=[],
        ).train()  # fmt: skip
        assert abs(run.last["rewards/margin"]) < 1e-5
