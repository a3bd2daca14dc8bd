"""Models of images and text: packed rows with images are what each document is alone, in loss and gradient."""

import base64
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import vision
from ranks import on_two_ranks
from toy import losses

import posttrain
from posttrain import HFModel, HFTokenizer, SFTData, SFTTrainer
from posttrain.blocks.images.processor import as_tensor
from posttrain.errors import RecipeError

SIZES = [(40, 24), (64, 64), (33, 57), (96, 40), (24, 48)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where the tiny models are."""
    return vision.models(tmp_path_factory)


def pictures(folder: Path, count: int = 5) -> list[Path]:
    files = [folder / f"{n}.png" for n in range(count)]
    for n, file in enumerate(files):
        vision.picture(n, SIZES[n % len(SIZES)]).save(file)
    return files


def ask(*parts: Any) -> dict[str, Any]:
    said = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "path": p.name} for p in parts]
    return {"role": "user", "content": said}


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def chats(folder: Path) -> list[dict[str, Any]]:
    """Rows with 1, 0, 3, 2 (in two turns) and 1 images."""
    a, b, c, d, e = pictures(folder)
    return [
        {"messages": [ask(a, "what is this?"), reply("a thing")]},
        {"messages": [{"role": "user", "content": "no image at all"}, reply("indeed, only text")]},
        {"messages": [ask("these ", b, " and ", c, d, "?"), reply("three")]},
        {"messages": [ask(e, "one"), reply("yes"), ask("and another ", a), reply("two by now")]},
        {"messages": [ask("at the end", c), reply("fine")]},
    ]


def written(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def built(family_folder: Path, source: Any, cache: Path, rank_rows: int = 1, **keys: Any) -> tuple[Any, Any, Any]:
    """The tokenizer, the loaders and the network of a model on a file."""
    model = HFModel(name_or_path=str(family_folder), **keys.pop("model", {}))
    tokenizer = HFTokenizer().build(model)
    data = SFTData(sources=[source], cache_dir=cache, **{"max_length": 2048, **keys})
    return tokenizer, data.build(tokenizer, rank_rows, 0, 1, 0), model


def alone(tokenizer: Any, model: Any, row: dict[str, Any], root: Path) -> torch.Tensor:
    """What transformers' own processor and network give for one row: the loss on what is supervised."""
    images, messages = [], []
    for message in row["messages"]:
        content = message["content"]
        for part in content if isinstance(content, list) else ():
            if part["type"] == "image":
                images.append(vision.opened(root / part["path"]))
        messages.append(message)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = dict(tokenizer.images.theirs(text=[text], images=images or None, return_mm_token_type_ids=True))
    ids = as_tensor(given.pop("input_ids"))
    known = inspect.signature(type(model).forward).parameters
    given = {k: as_tensor(v) for k, v in given.items() if k in known and k != "attention_mask"}
    logits = model(input_ids=ids, **given, use_cache=False).logits[0]
    decoded, supervised = [tokenizer.decode([i]) for i in ids[0].tolist()], torch.zeros(ids.shape[1], dtype=bool)
    inside = False
    for n, token in enumerate(decoded):  # what stands between `assistant\n` and `<|im_end|>`
        supervised[n] = inside
        inside = inside and token != "<|im_end|>"
        if "".join(decoded[: n + 1]).endswith("<|im_start|>assistant\n"):
            inside = True
    wanted = supervised[1:] & (ids[0, 1:] != tokenizer.images.token_id)
    return torch.nn.functional.cross_entropy(logits[:-1][wanted], ids[0, 1:][wanted], reduction="sum")


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_packed_images_are_what_they_are_alone(folder: Any, tmp_path: Path, family: str) -> None:
    rows = chats(tmp_path)
    for order in ([0, 1, 2, 3, 4], [2, 4, 1, 0, 3]):
        tokenizer, loaders, block = built(
            folder(family), written(tmp_path, [rows[n] for n in order]), tmp_path / "cache",
            model={"train": ["language", "projector", "tower"]},
        )  # fmt: skip
        (batch,) = loaders.train.one_pass()
        network = block.build(None).eval()
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder(family)).eval()
        ours = network(batch)
        ours.backward()
        expected = sum(alone(tokenizer, theirs, row, tmp_path) for row in rows)
        expected.backward()
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        pairs = [(p.grad, q.grad) for p, q in zip(network.base.parameters(), theirs.parameters(), strict=True)]
        most = max(float(theirs.abs().max()) for _, theirs in pairs if theirs is not None)
        for mine, other in pairs:
            gap = (0 if mine is None else mine) - (0 if other is None else other)
            assert float(torch.as_tensor(gap).abs().max()) <= 1e-5 * most
        assert loaders.ledger["total"]["images"] == 7
        logits = network(batch, "logits").log_softmax(-1).gather(1, batch.targets[:, None]).sum()
        assert -logits.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "spoil"), [("gemma3", "blocks"), ("qwen2_5_vl", "positions"), ("qwen3_vl", "positions")]
)
def test_without_its_measure_a_packed_image_would_be_another(
    folder: Any, tmp_path: Path, family: str, spoil: str
) -> None:
    _, loaders, block = built(folder(family), written(tmp_path, chats(tmp_path)), tmp_path / "cache")
    (batch,) = loaders.train.one_pass()
    network = block.build(None).eval()
    right = network(batch, "log_probs")
    if spoil == "blocks":
        from posttrain.blocks.models.vision.parts import Sight

        assert network.sight.blocks
        network.sight = Sight(False, network.sight.language)
    else:
        batch = batch.but(position_ids=batch.position_ids[0])
    assert float((network(batch, "log_probs") - right).detach().abs().max()) > 0.02


# -- what the model block does ----------------------------------------------------------


def trained(network: Any) -> set[str]:
    from posttrain.blocks.models.vision.parts import parts_of

    parts = parts_of(network.base)
    assert parts is not None
    return {parts.of(name) for name, parameter in network.base.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "idefics3"])
def test_one_key_says_which_parts_are_trained(folder: Any, family: str) -> None:
    name = str(folder(family))
    assert trained(HFModel(name_or_path=name).build(None)) == {"language", "projector"}
    for parts in (["language"], ["projector"], ["tower", "projector"]):
        assert trained(HFModel(name_or_path=name, train=parts).build(None)) == set(parts)


def test_a_model_of_text_has_no_tower_to_train(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.train: 'llama' is a model of text alone, so language must be in it"):
        HFModel(name_or_path=str(tiny_model), train=["tower"]).build(None)


def trainer(family_folder: Path, source: Any, root: Path, **keys: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 3, "micro_batch_size": 1, "logger": [posttrain.JSONL()], "log_every": 1, "accelerator": "cpu",
        "optimizer": posttrain.AdamW(lr=1e-2, weight_decay=0.1), "output_dir": root / "run", "max_grad_norm": None,
    }  # fmt: skip
    data = {"max_length": 256, "cache_dir": root / "cache", **keys.pop("data", {})}
    model = HFModel(name_or_path=str(family_folder), **keys.pop("model", {}))
    return SFTTrainer(model=model, data=SFTData(sources=[source], **data), **{**defaults, **keys})


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_text_alone_trains_the_language_model_and_exports_the_whole(
    folder: Any, sums: Path, tmp_path: Path, family: str
) -> None:
    out = tmp_path / "out"
    trainer(folder(family), str(sums), tmp_path, checkpoint=[posttrain.HuggingFace(output_dir=out)]).train()
    before, after = (transformers.AutoModelForImageTextToText.from_pretrained(where) for where in (folder(family), out))
    from posttrain.blocks.models.vision.parts import parts_of

    parts, moved = parts_of(before), set()
    assert parts is not None
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if not torch.equal(old, new):
            moved.add(parts.of(name))
    assert moved == {"language"}


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_an_export_has_the_processor_and_sees_the_same(folder: Any, tmp_path: Path, family: str) -> None:
    out, root = tmp_path / "out", tmp_path / "rows"
    root.mkdir()
    source = str(written(root, chats(root)))
    run = trainer(folder(family), source, tmp_path, checkpoint=[posttrain.HuggingFace(output_dir=out)]).train()
    tokenizer, loaders, block = built(out, source, tmp_path / "again")
    again = block.build(None).eval()
    for batch in loaders.train.one_pass():
        ours = run.model.module.eval()(batch, "log_probs")
        torch.testing.assert_close(again(batch, "log_probs"), ours, rtol=1e-4, atol=1e-4)
    theirs, mine = (json.loads((where / "processor_config.json").read_text()) for where in (folder(family), out))
    assert theirs == mine
    assert tokenizer.chat_template == run.tokenizer.chat_template


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("qwen3_vl", "fsdp"),
        ("gemma3", "ddp"),
        pytest.param("qwen3_vl", "ddp", marks=pytest.mark.slow),
        pytest.param("gemma3", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_with_and_without_images_are_one(folder: Any, tmp_path: Path, family: str, strategy: str) -> None:
    """Some micro-batches hold no image, on one rank or on both."""
    root = tmp_path / "rows"
    root.mkdir()
    text = [{"messages": [{"role": "user", "content": f"{n}?"}, reply("no image " * n)]} for n in range(1, 6)]
    source = str(written(root, chats(root)[:3] + text))
    keys = "max_steps=4, data=dict(packing=False, max_length=512), model=dict(train=['language', 'projector', 'tower'])"
    made = f"trainer(Path({str(folder(family))!r}), {source!r}, folder, {keys}"
    exec(f"{made}, gradient_accumulation_steps=2).train()", globals(), {"folder": tmp_path / "one"})
    (tmp_path / "one" / "run").exists()
    block = "" if strategy == "ddp" else ", strategy=posttrain.FSDP()"
    on_two_ranks(tmp_path, "test_vision", f"{made}, devices=2{block}).train()")
    one, two = losses(tmp_path / "one" / "run"), losses(tmp_path / "two" / "run")
    assert one == pytest.approx(two, rel=2e-5)
    assert len(one) == 4


def test_lora_goes_where_it_is_told(folder: Any) -> None:
    pytest.importorskip("peft")
    name = str(folder("qwen3_vl"))
    lora = posttrain.LoRA(r=2)
    made = HFModel(name_or_path=name, lora=lora, train=["language"]).build(None)
    names = [n for n, p in made.named_parameters() if p.requires_grad]
    assert names
    assert all("language_model" in n and "lora" in n for n in names)
    projector = posttrain.LoRA(r=2, target_modules=r".*merger\.linear_fc.")
    made = HFModel(name_or_path=name, lora=projector).build(None)
    names = [n for n, p in made.named_parameters() if p.requires_grad]
    assert names
    assert all("merger" in n for n in names)


# -- tools ------------------------------------------------------------------------------


def recipe(family_folder: Path, source: Path, root: Path, **keys: Any) -> Path:
    file = root / "recipe.yaml"
    data = {"sources": [str(source)], "max_length": 512, "cache_dir": str(root / "cache")}
    said = {"type": "sft", "model": {"name_or_path": str(family_folder)}, "data": data, "output_dir": str(root / "run"),
            "checkpoint": [{"type": "huggingface"}], "accelerator": "cpu", "max_steps": 2, **keys}  # fmt: skip
    file.write_text(json.dumps(said))
    return file


@pytest.mark.parametrize(("family", "inline"), [("qwen3_vl", False), ("qwen3_vl", True), ("qwen3_5", False)])
def test_the_twin_of_a_recipe_sees_images(folder: Any, tmp_path: Path, family: str, inline: bool) -> None:
    from posttrain.tools.twin import proofs

    rows = chats(tmp_path)
    if inline:
        for message in (message for row in rows for message in row["messages"]):
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "image":
                    data = (tmp_path / part.pop("path")).read_bytes()
                    part["base64"] = base64.b64encode(data).decode()
    file = recipe(folder(family), written(tmp_path, rows), tmp_path)
    checks = [proofs.masks, proofs.packing, proofs.cuts, proofs.export]
    found = list(proofs.prove(file, [], checks))
    assert [(one.name, one.passed) for one in found if not one.passed] == []
    with_images = proofs.Twin(file, [], tmp_path / "twin")
    (tmp_path / "twin").mkdir()
    loaders = with_images.sampled(4).build(with_images.tokenizer, 4, 0, 1, 0)
    assert loaders.ledger["total"]["images"] > 0


def test_show_draws_a_box_for_each_image(
    folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.cli import main

    monkeypatch.setenv("COLUMNS", "160")
    file = recipe(folder("llava"), written(tmp_path, chats(tmp_path)), tmp_path)
    main(["show", str(file), "--data"])
    shown = capsys.readouterr().out
    assert "[image 40x24, 16 tokens, 0.png]what is this?" in shown
    assert "rows.jsonl:1  57 tokens, 8 supervised" in shown


def test_a_processor_that_cannot_be_loaded_leaves_the_text(
    folder: Any, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one that wants torchvision."""
    from posttrain.blocks.images import loading

    name = vision.make("llava", tmp_path / "model")

    def refuse(kind: str) -> Any:
        raise ImportError(f"{kind} requires the Torchvision library")

    monkeypatch.setattr(loading, "class_of", refuse)
    made = trainer(name, str(sums), tmp_path)
    assert made.train().status == "finished"
    assert "requires the Torchvision library; it can be trained on text alone" in caplog.text
    with pytest.raises(RecipeError, match="requires the Torchvision library"):
        HFTokenizer(processor={"max_pixels": 1}).build(HFModel(name_or_path=str(name)))
    with pytest.raises(RecipeError, match=r"only the language model can be trained: its processor cannot be loaded"):
        HFModel(name_or_path=str(name), train=["tower"]).build(None)
    rows = [{"messages": [ask(pictures(tmp_path)[0]), reply("a")]}]
    with pytest.raises(posttrain.DataError, match="there are images, and the model sees none"):
        built(name, str(written(tmp_path, rows)), tmp_path / "cache")


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "internvl", "mistral3"])
def test_a_plan_counts_what_images_take(folder: Any, tmp_path: Path, family: str) -> None:
    from posttrain.tools.tracing import trace

    root = tmp_path / "rows"
    root.mkdir()
    source = str(written(root, chats(root)))
    text = str(written(root, [{"prompt": "?", "completion": "no image"}], "text.jsonl"))
    found = {}
    for name, file, parts in (
        ("text", text, ["language", "projector"]), ("frozen", source, ["language", "projector"]),
        ("tower", source, ["language", "projector", "tower"]),
    ):  # fmt: skip
        made = trainer(folder(family), file, tmp_path, model={"train": parts}, data={"max_length": 96})
        found[name] = sum(alive for _, alive in trace(made).moments)  # of text and of images: the text may take more
    assert found["text"] <= found["frozen"] < found["tower"]


def test_a_plan_says_where_it_cannot_count_images(folder: Any, tmp_path: Path, caplog: Any) -> None:
    from posttrain.tools.tracing import trace

    source = str(written(tmp_path, chats(tmp_path)))
    assert trace(trainer(folder("idefics3"), source, tmp_path)).activations > 0
    assert "what images take is not in the plan" in caplog.text
