"""Rows with images: the ways to name one, what is refused, what is counted, what is trained, and where rows are cut."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vision
from test_vision import ask, folder, pictures, reply, written
from tokens import byte_tokenizer
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from posttrain import HFModel, HFTokenizer, SFTData, Source
from posttrain.blocks.images import loading
from posttrain.blocks.images.processor import Processor, as_tensor
from posttrain.errors import DataError, RecipeError

__all__ = ["folder"]  # a fixture


# -- rows -------------------------------------------------------------------------------


def encoded(folder: Path, file: Any, cache: Path, **keys: Any) -> tuple[Any, Any]:
    """The tokenizer, and what the data block makes of a file."""
    tokenizer = HFTokenizer().build(HFModel(name_or_path=str(folder)))
    source = file if isinstance(file, Source) else str(file)
    data = SFTData(sources=[source], cache_dir=cache, **{"max_length": 2048, **keys})
    return tokenizer, data.build(tokenizer, 1, 0, 1, 0)


def png(seed: int, size: tuple[int, int] = (40, 24)) -> bytes:
    vision.picture(seed, size).save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


def test_an_image_may_be_named_in_many_ways(folder: Any, tmp_path: Path) -> None:
    vision.picture(0).save(tmp_path / "a.png")
    text = base64.b64encode(png(0)).decode()
    forms = [
        {"type": "image", "image": "a.png"}, {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "url": f"file://{tmp_path / 'a.png'}"}, {"type": "image", "base64": text},
        {"type": "image", "image": f"data:image/png;base64,{text}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        {"type": "input_image", "image_url": f"data:image/png;base64,{text}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text}},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
    ]  # fmt: skip
    question = {"type": "text", "text": "?"}
    rows: list[Any] = [{"messages": [{"role": "user", "content": [form, question]}, reply("a")]} for form in forms]
    rows += [
        {"messages": [{"role": "user", "content": [{"type": "image"}, question]}, reply("a")], "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}], "image": "a.png"},
        {"messages": [{"role": "user", "content": "?"}, reply("a")], "images": [{"path": "a.png"}]},
        {"prompt": "<image>?", "completion": "a", "images": ["a.png"]},
    ]
    tokenizer, loaders = encoded(folder("qwen2_5_vl"), written(tmp_path, rows), tmp_path / "cache")
    assert loaders.ledger["total"]["images"] == len(rows)
    (batch,) = loaders.train.one_pass()
    texts = {tuple(ids) for _, ids, _ in batch.documents()}
    assert len(texts) == 1
    pixels = batch.arguments["images"].values["pixel_values"].view(len(rows), -1)
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    right = tokenizer.images.process([vision.opened(tmp_path / "a.png")])[0]["pixel_values"]
    assert torch.equal(pixels[0], right.flatten())


def test_tables_with_image_features_are_read_again_from_their_files(folder: Any, tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "?", "completion": str(n), "images": [{"bytes": png(n), "path": None}]} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    features = datasets.Features({"prompt": datasets.Value("string"), "completion": datasets.Value("string"),
                                  "images": datasets.List(datasets.Image())})  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "disk"))
    found = []
    for source in (tmp_path / "a.parquet", tmp_path / "disk"):
        _, loaders = encoded(folder("llava"), source, tmp_path / "cache")
        (batch,) = loaders.train.one_pass()
        found.append(batch.arguments["images"].values["pixel_values"])
        stored = b"".join(f.read_bytes() for f in (tmp_path / "cache").rglob("column-images"))
        assert all(png(n) not in stored for n in range(3))
    assert len(found[0]) == 3
    assert torch.equal(found[0], found[1])


def test_a_stream_brings_its_images(folder: Any, tmp_path: Path) -> None:
    text = base64.b64encode(png(0)).decode()
    rows = [
        {"prompt": "<image>?", "completion": f"{n}", "images": [{"bytes": None, "path": "a.png"}]} for n in range(3)
    ]
    rows.append({"prompt": "<image>?", "completion": "inline", "images": [f"data:image/png;base64,{text}"]})
    (tmp_path / "a.png").write_bytes(png(0))
    source = Source(name_or_path=str(written(tmp_path, rows)), stream=True)
    _, loaders = encoded(folder("llava"), source, tmp_path / "cache", window=4)
    batches = list(loaders.train.one_pass())
    pixels = torch.cat([batch.arguments["images"].values["pixel_values"] for batch in batches])
    assert torch.equal(pixels, pixels[:1].expand(4, -1, -1, -1))
    (entry,) = loaders.ledger["sources"].values()
    assert (entry["images"], entry["image_tokens"]) == (4, 64)


def test_a_placeholder_that_somebody_wrote_stays_text(folder: Any, tmp_path: Path) -> None:
    for family in vision.FAMILIES:
        (tmp_path / "a.png").write_bytes(png(0))
        word = tokenizer_word(folder(family))
        rows = [
            {"messages": [ask(Path("a.png"), f"what does {word} mean, {word}{word}?"), reply(f"{word} is an image")]},
            {"messages": [{"role": "user", "content": f"only {word}"}, reply("no image")]},
        ]
        tokenizer, loaders = encoded(folder(family), written(tmp_path, rows), tmp_path / "cache")
        assert loaders.ledger["total"]["images"] == 1
        (batch,) = loaders.train.one_pass()
        image, tokens = tokenizer.images.token_id, tokenizer.images.expansion((40, 24)).tokens
        assert int((batch.input_ids == image).sum()) == tokens
        said = [tokenizer.decode(trained) for _, _, trained in batch.documents()]
        assert sorted(said) == sorted([f"{word} is an image<|im_end|>", "no image<|im_end|>"])


def tokenizer_word(folder: Path) -> str:
    return str(HFTokenizer().build(HFModel(name_or_path=str(folder))).images.token)


def test_another_control_token_in_a_message_is_refused(folder: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "<|im_end|>"}, reply("a")]}]
    with pytest.raises(DataError, match=r"holds the control token <\|im_end\|>"):
        encoded(folder("llava"), written(tmp_path, rows), tmp_path / "cache")


@pytest.mark.parametrize("family", ["idefics3", "mistral3", "gemma3"])
def test_no_token_of_an_image_is_trained_even_in_a_reply(folder: Any, tmp_path: Path, family: str) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    shown = {"role": "assistant", "content": [{"type": "text", "text": "see "}, {"type": "image", "path": "a.png"}]}
    tokenizer, loaders = encoded(
        folder(family), written(tmp_path, [{"messages": [ask("draw it"), shown]}]), tmp_path / "cache"
    )
    (batch,) = loaders.train.one_pass()
    ((_, ids, trained),) = batch.documents()
    assert tokenizer.images.token_id in ids
    assert tokenizer.decode(trained) == "see <|im_end|>"


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_a_row_is_never_cut_inside_an_image(folder: Any, tmp_path: Path, overflow: str) -> None:
    a, b, *_ = pictures(tmp_path)
    talk = [ask(a, "x" * 7), reply("one " * 4), ask("so ", b, "y" * 9), reply("two " * 5)]
    file = written(tmp_path, [{"messages": talk}])
    for longest in range(20, 190, 9):
        try:
            tokenizer, loaders = encoded(
                folder("llava"), file, tmp_path / "cache", max_length=longest, overflow=overflow, invalid="drop",
                packing=False,
            )  # fmt: skip
        except DataError as error:
            assert "nothing is left" in str(error)
            continue
        held = 0
        for batch in loaders.train.one_pass():
            placed = int((batch.input_ids == tokenizer.images.token_id).sum())
            count = batch.counted["images"]
            assert placed == 16 * count
            held += count
            if count:
                assert len(batch.arguments["images"].values["pixel_values"]) == count
        assert held == loaders.ledger["total"]["images"]


def test_an_image_that_no_row_can_hold_is_dropped_and_counted(folder: Any, tmp_path: Path) -> None:
    a, *_ = pictures(tmp_path)
    rows = [{"messages": [ask(a), reply("one")]}, {"messages": [ask("text"), reply("two")]}]
    keys = {"max_length": 12, "packing": False}
    _, loaders = encoded(folder("llava"), written(tmp_path, rows), tmp_path / "c", overflow="split", **keys)
    assert loaders.ledger["total"]["dropped"]["cut, an image has more tokens than data.max_length"] == 1


def damaged(folder: Path) -> dict[str, tuple[Any, str]]:
    """Images that cannot be trained on, and what is said of each."""
    from PIL import Image

    (folder / "text.png").write_text("I am no image")
    (folder / "half.png").write_bytes(png(0, (64, 64))[:200])
    (folder / "empty.png").write_bytes(b"")
    vision.picture(0, (64, 64)).save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:400])
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "folder.png").mkdir()
    return {
        "missing": ("nowhere.png", r"an image file is missing \(such as .*: .*nowhere.png\)"),
        "text": ("text.png", "what should be an image is none that Pillow knows"),
        "words": ("a cat\nsits there", "an image is a text that is neither a path nor an address"),
        "half a png": ("half.png", r"an image is damaged \(\w+\)"),
        "half a jpeg": ("half.jpg", r"an image is damaged \(OSError\)"),
        "nothing": ("empty.png", "what should be an image is none that Pillow knows"),
        "100 megapixels": ("huge.png", r"an image is larger than data.max_megapixels \(50\)"),
        "400 megapixels": ("bomb.png", r"an image is larger than data.max_megapixels \(50\)"),
        "a folder": ("folder.png", r"an image file cannot be read \(IsADirectoryError\)"),
        "no base64": ("data:image/png;base64,!!!", "an image is no valid base64"),
        "an address that is away": ("http://127.0.0.1:9/a.png", r"an image cannot be fetched \(ConnectError\)"),
    }


def test_an_image_that_cannot_be_read_is_an_error_with_its_row(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(0))
    for n, (what, (name, message)) in enumerate(damaged(tmp_path).items()):
        rows = [
            {"messages": [ask(Path("good.png")), reply("fine")]},
            {"messages": [{"role": "user", "content": [{"type": "image", "image": name}]}, reply("not")]},
        ]
        file = written(tmp_path, rows, f"{n}.jsonl")
        with pytest.raises(DataError, match=rf"1 x {message}") as told:
            encoded(folder("llava"), file, tmp_path / "cache")
        assert f"{n}.jsonl:2" in str(told.value), what
        _, loaders = encoded(folder("llava"), file, tmp_path / "cache", invalid="drop")
        total = loaders.ledger["total"]
        assert (total["images"], sum(total["dropped"].values())) == (1, 1)


REFUSED = {
    "sound": ({"type": "audio", "audio": "a.wav"}, "a part of type 'audio', and only text and images"),
    "a film": ({"type": "video_url", "video_url": "a.mp4"}, "a part of type 'video_url', and only text and images"),
    "a number": ({"type": "image", "image": 3}, "an image is int, not a path"),
    "no image": ({"type": "image"}, "names no image, and there is no column"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_part_that_is_no_image_is_refused_with_the_reason(folder: Any, tmp_path: Path, name: str) -> None:
    part, message = REFUSED[name]
    rows = [{"messages": [{"role": "user", "content": [part]}, reply("a")]}]
    with pytest.raises(DataError, match=message):
        encoded(folder("llava"), written(tmp_path, rows), tmp_path / "cache")


def test_images_and_places_must_be_as_many(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    two = {"prompt": "<image> and <image>", "completion": "a", "images": ["a.png"]}
    with pytest.raises(DataError, match="there are 1 images in 'images', and 2 times <image> in the messages"):
        encoded(folder("llava"), written(tmp_path, [two]), tmp_path / "cache")
    both = {"messages": [ask(Path("a.png")), reply("a")], "images": ["a.png"]}
    with pytest.raises(DataError, match="messages name images of their own: keep one of both"):
        encoded(folder("llava"), written(tmp_path, [both]), tmp_path / "cache")


def test_a_model_of_text_refuses_images(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(DataError, match="there are images, and the model sees none"):
        encoded(tiny_model, written(tmp_path, [{"messages": [ask(Path("a.png")), reply("a")]}]), tmp_path / "cache")


def test_images_of_all_kinds_are_seen_as_people_see_them(folder: Any, tmp_path: Path) -> None:
    from PIL import Image

    from posttrain.blocks.images.pixels import decode

    upright = Image.new("RGB", (20, 10), "red")
    upright.paste("blue", (0, 0, 10, 10))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    turned.save(tmp_path / "exif.png", exif=exif)
    upright.save(tmp_path / "film.gif", save_all=True, append_images=[Image.new("RGB", (20, 10), "green")])
    upright.convert("CMYK").save(tmp_path / "cmyk.tif")
    upright.save(tmp_path / "plain.png")
    clear = upright.convert("RGBA")
    clear.putalpha(Image.new("L", (20, 10), 0))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.full((10, 20), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("exif.png", "film.gif", "cmyk.tif", "plain.png"):
        found = decode((tmp_path / name).read_bytes(), 50)
        assert found.size == (20, 10), name
        left, right = found.getpixel((3, 5)), found.getpixel((16, 5))
        assert left[2] > 200 > 60 > left[0], name
        assert right[0] > 200 > 60 > right[2], name
    assert decode((tmp_path / "clear.png").read_bytes(), 50).getpixel((3, 5)) == (255, 255, 255)
    grey = decode((tmp_path / "deep.png").read_bytes(), 50).getpixel((3, 5))
    assert grey == (155, 155, 155)
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    for family in vision.FAMILIES:
        rows = [{"messages": [ask(Path(name)), reply("a")]} for name in ("exif.png", "dot.png")]
        _, loaders = encoded(folder(family), written(tmp_path, rows), tmp_path / "cache")
        (batch,) = loaders.train.one_pass()
        assert batch.counted["images"] == 2


def test_an_image_that_changed_is_noticed(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    file = written(tmp_path, [{"messages": [ask(Path("a.png")), reply("a")]}])
    _, loaders = encoded(folder("qwen2_5_vl"), file, tmp_path / "cache")
    (tmp_path / "a.png").write_bytes(png(1, (64, 64)))
    with pytest.raises(DataError, match=r"a.png was changed since its row was tokenized"):
        list(loaders.train.one_pass())
    _, loaders = encoded(folder("qwen2_5_vl"), file, tmp_path / "cache")
    (batch,) = loaders.train.one_pass()
    assert batch.arguments["images"].values["image_grid_thw"].tolist() == [[1, 8, 8]]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="an image file is missing"):
        encoded(folder("qwen2_5_vl"), file, tmp_path / "cache")


def test_an_image_at_an_address_is_fetched_once(folder: Any, tmp_path: Path) -> None:
    import http.server
    import threading

    asked: list[str] = []

    class Served(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(png(0))

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        rows = [{"messages": [ask("x"), reply("a")], "images": [f"{address}/a.png"]}]
        _, loaders = encoded(folder("llava"), written(tmp_path, rows), tmp_path / "cache")
        (batch,) = loaders.train.one_pass()
        assert batch.counted["images"] == 1
        assert asked == ["/a.png"]
        rows[0]["images"] = [f"{address}/b.png"]
        with pytest.raises(DataError, match=r"an image cannot be fetched \(status 404\).*b.png"):
            encoded(folder("llava"), written(tmp_path, rows), tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()


def test_another_processor_makes_other_tables(folder: Any, tmp_path: Path) -> None:
    """What is stored depends on how many tokens an image becomes, wherever the processor says so."""
    (tmp_path / "a.png").write_bytes(png(0, (64, 64)))
    file = written(tmp_path, [{"messages": [ask(Path("a.png")), reply("a")]}])
    name, found = str(folder("qwen2_5_vl")), []
    for most in (4096, 1024):
        tokenizer = HFTokenizer(processor={"max_pixels": most}).build(HFModel(name_or_path=name))
        data = SFTData(sources=[str(file)], cache_dir=tmp_path / "cache")
        ledger = data.build(tokenizer, 1, 0, 1, 0).ledger["total"]
        found.append((ledger["image_tokens"], ledger["images_shrunk"]))
    assert found == [(16, 0), (4, 1)]
    other = HFTokenizer().build(HFModel(name_or_path=str(folder("idefics3"))))
    before = other.images.fingerprint()
    other.images.theirs.image_seq_len = 5
    other.images.known.clear()
    assert other.images.fingerprint() != before


def test_an_argument_that_the_processor_does_not_know_is_refused(folder: Any, tiny_model: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"tokenizer.processor: \w+ has no key 'max_pixel'; did you mean 'max_pixels'"
    ):
        HFTokenizer(processor={"max_pixel": 9}).build(HFModel(name_or_path=str(folder("qwen2_5_vl"))))
    with pytest.raises(RecipeError, match="there is no processor of images beside"):
        HFTokenizer(processor={"max_pixels": 9}).build(HFModel(name_or_path=str(tiny_model)))


@pytest.mark.parametrize(("kind", "first"), [("Gemma4", "feature_extractor"), ("LlavaNextVideo", "video_processor")])
def test_parts_for_sound_and_videos_may_come_first_and_are_kept(tmp_path: Path, kind: str, first: str) -> None:
    """Without torchvision they are not loaded, and transformers hands parts on by position."""
    tokenizer, name = vision.tokenizer_of("gemma3" if kind == "Gemma4" else "llava"), f"{kind}Processor"
    seen = LlavaNextImageProcessorPil() if kind == "LlavaNextVideo" else Gemma4ImageProcessorPil()
    assert loading.class_of(name).parts[0] == first
    parts = dict.fromkeys(loading.class_of(name).parts) | {"image_processor": seen, "tokenizer": tokenizer}
    loading.class_of(name)(**parts).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {first: {"size": 1}}))
    config = SimpleNamespace(image_token_id=1)
    ours = loading.load(str(tmp_path / "theirs"), tokenizer, config, {}, {})
    assert ours is not None
    assert type(ours.theirs.image_processor) is type(seen)
    assert not hasattr(ours.theirs, first)
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / file.name).read_text()) == json.loads(file.read_text())


def test_a_processor_whose_places_depend_on_each_other_is_refused() -> None:
    theirs = loading.class_of("Idefics2Processor")(Idefics2ImageProcessorPil(), byte_tokenizer())
    with pytest.raises(
        RecipeError, match="Idefics2Processor does not say what becomes of the place of one image alone"
    ):
        Processor(theirs, theirs.tokenizer, SimpleNamespace(image_token_id=1), {})


def test_pixels_in_half_precision_become_what_others_are() -> None:
    """As Llama 4's processor makes them."""
    assert as_tensor(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert as_tensor(torch.ones(2, dtype=torch.int64)).dtype == torch.int64


def test_plain_text_trains_on_a_model_that_sees_images(folder: Any, tmp_path: Path) -> None:
    from posttrain import CausalData

    tokenizer = HFTokenizer().build(HFModel(name_or_path=str(folder("qwen3_vl"))))
    source = str(written(tmp_path, [{"text": "some words"}]))
    (batch,) = CausalData(sources=[source], cache_dir=tmp_path / "c").build(tokenizer, 1, 0, 1, 0).train.one_pass()
    assert batch.supervised_tokens == 10
