"""The processor of a model type by its defaults, and what becomes of packed images through it: for models.py.

A type comes with no tokenizer. It gets one of bytes, with every control token that its processor names.
"""

import contextlib
import importlib
import inspect
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import transformers
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from posttrain.blocks.images.loading import SeesImages, class_of, for_images
from posttrain.blocks.images.processor import Processor
from posttrain.blocks.models.documents import probe
from posttrain.blocks.models.vision.sight import tried
from posttrain.errors import RecipeError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from tokens import byte_tokenizer

TOKEN = re.compile(r"""["'](<[^"'\s{}]+>|\[[A-Z_]+\])["']""")
NAMED = re.compile(r"tokenizer(?:\.|, \")(\w+_token)(?:_id)?\b")
TILES = {"vision_config": {"image_size": 256, "patch_size": 32}, "scale_factor": 2}
CHANGES = {
    "gemma3": {"mm_tokens_per_image": 49}, "idefics3": TILES, "smolvlm": TILES,
    "aria": {"vision_config": {"model_type": "idefics3_vision", "image_size": 490, "patch_size": 14}},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14}},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
}  # fmt: skip
"""What the default configuration of a type lacks to see images."""
TYPES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
TITLE = "## Models of images and text, with images"
HEAD = f"""{TITLE}

A processor of each type, made from its defaults beside a tokenizer of bytes, saw documents with no, one and two images,
packed and alone: `python benchmarks/models.py --images --write docs/models.md`. "Not tried" are types whose defaults, or
what they become in a tiny copy, do not fit each other, and those whose processor needs torchvision where there was none. A
downloaded model brings what fits, and is tried when it is built.

"""
PROCESSORS = {"glm_ocr": "Glm46VProcessor"}
"""Of types for which transformers names none."""
ARGUMENTS = {
    "gemma3": {"image_seq_length": 49}, "idefics3": {"image_seq_len": 16}, "smolvlm": {"image_seq_len": 16},
    "aya_vision": {"img_size": 224}, "vipllava": {"vision_feature_select_strategy": "default"},
}  # fmt: skip
"""What its processor must be told to fit that."""


def fitted(images, config):
    """Return an image processor that makes images as large as the tower of a configuration takes them."""
    vision = getattr(config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side, patch = (x[0] if isinstance(x, list | tuple) else x for x in (side, patch))
    if patch and isinstance(getattr(images, "patch_size", None), int):
        images.patch_size = patch
    for name in ("merge_size", "temporal_patch_size"):
        for part in (vision, config):
            value = getattr(part, name, None) or getattr(part, f"spatial_{name}", None)
            if value and getattr(images, name, None):
                setattr(images, name, value)
    if not side or getattr(images, "merge_size", None):
        return images
    for name, times in (("size", 2), ("crop_size", 1), ("max_image_size", 1)):
        held = getattr(images, name, None)
        if isinstance(held, int):
            setattr(images, name, side)
        elif held:
            keys = [
                key
                for key in ("height", "width", "shortest_edge", "longest_edge")
                if key in dict(held) and dict(held)[key]
            ]
            setattr(images, name, type(held)(**{key: side * (times if key == "longest_edge" else 1) for key in keys}))
    return images


def seen(kind: str, changes: dict[str, dict]) -> str:
    """Say what becomes of the images of a type: exact, and how, or why not."""
    try:
        config = AutoConfig.for_model(kind, **changes.get(kind, {}), **CHANGES.get(kind, {}))
        way = probe.find_way(config, kind, None)
        if not way.proven:
            return "refused: no tiny copy of it could be tried"
        if way.unfolds:
            return "refused: documents have rows of their own"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processor = processor_of(kind, config)
        with probe.on_the_side():
            found = tried(config, processor, way)
    except RecipeError as error:
        return f"refused: {in_short(error)}"
    except NotTried as error:
        return f"not tried: {error}"
    except Exception as error:
        return f"not tried: {type(error).__name__}: {in_short(error)}"
    if isinstance(found, str):
        return f"refused: {found}"
    how = ", each image sees all of itself" if found else ""
    return f"exact{how}" if "pil" in image_processors(kind) else f"exact{how}, with torchvision"


class NotTried(Exception):
    """Why a type is not tried at all."""


def in_short(error: Exception) -> str:
    """Return the beginning of a message, as a cell of a table."""
    return " ".join(str(error).split())[:110].replace("|", "/")


def image_processors(kind: str) -> dict[str, str]:
    """Return the classes that process the images of a type, by what they need; those of a type with its processor."""
    name = PROCESSOR_MAPPING_NAMES.get(kind) or PROCESSORS.get(kind)
    alike = [k for k, theirs in PROCESSOR_MAPPING_NAMES.items() if theirs == name]
    for k in (kind, *alike):
        if k in IMAGE_PROCESSOR_MAPPING_NAMES:
            return IMAGE_PROCESSOR_MAPPING_NAMES[k]
    raise NotTried("transformers names no processor of images for this type")


def processor_of(kind: str, config) -> Processor:
    """Return the processor of a type, made from its defaults and its configuration."""
    name = PROCESSOR_MAPPING_NAMES.get(kind) or PROCESSORS.get(kind)
    if name is None:
        raise NotTried("transformers names no processor for this type")
    module = importlib.import_module(f"transformers.{transformers._class_to_module[name]}") if "pixtral" not in str(
        transformers._class_to_module[name]) else None  # fmt: skip
    cls = class_of(name)
    cls = cls if issubclass(cls, SeesImages) else for_images(cls)
    source = inspect.getsource(module or sys.modules[cls.__module__])
    tokens = ["<|im_start|>", "<|im_end|>", "<|pad|>", *dict.fromkeys(TOKEN.findall(source))]
    attributes = {n for n in NAMED.findall(source) if n not in ("pad_token", "eos_token", "bos_token", "unk_token")}
    tokens += [f"<{n}>" for n in sorted(attributes)]
    tokenizer = byte_tokenizer(None, list(dict.fromkeys(tokens)))
    for n in attributes:
        token = f"<{n}>"
        setattr(tokenizer, n, token)
        setattr(tokenizer, f"{n}_id", tokenizer.convert_tokens_to_ids(token))
    made = image_processors(kind)
    made = made.get("torchvision" if is_torchvision_available() else "pil") or made.get("pil")
    if made is None:
        raise NotTried("its processor of images needs torchvision")
    images = getattr(transformers, made)
    with contextlib.suppress(Exception):
        images = getattr(importlib.import_module(f"transformers.{transformers._class_to_module[made]}"), made)
    known = inspect.signature(cls.__init__).parameters
    said = {}
    for n in known:
        for part in (config, getattr(config, "vision_config", None)):
            if n not in said and n not in ("self", "chat_template", *cls.parts) and getattr(part, n, None) is not None:
                said[n] = getattr(part, n)
    if "num_additional_image_tokens" in known:
        said["num_additional_image_tokens"] = 1  # what CLIP puts in front, and its features leave out
    tower = getattr(config, "vision_config", None)
    if "num_image_tokens" in known and getattr(tower, "patch_size", None):
        said.setdefault("num_image_tokens", (tower.image_size // tower.patch_size) ** 2)
    said |= ARGUMENTS.get(kind, {})
    parts = dict.fromkeys(cls.parts) | {"image_processor": fitted(images(), config), "tokenizer": tokenizer}
    theirs = cls(**parts, **said)
    made = Processor(theirs, tokenizer, config, {})
    (text,) = made.process([Image.new("RGB", (64, 64))])[1]
    made.token_id = Counter(theirs.tokenizer(text, add_special_tokens=False)["input_ids"]).most_common(1)[0][0]
    for n in ("image_token_id", "image_token_index"):
        if n in config.to_dict():
            setattr(config, n, made.token_id)
    return made


def rewritten(page: str, only: list[str] | None, changes: dict[str, dict]) -> str:
    """Return a page with its section on images measured anew, and print that on the way.

    Args:
        page: ends with that section.
        only: these types; others stay as the page has them. None for all.
        changes: what the default configurations of types lack, by type.
    """
    page, _, old = page.partition(TITLE)
    rows = {line.split("`")[1]: line for line in old.splitlines() if line.startswith("| `")}
    for kind in TYPES if only is None else only:
        found = seen(kind, changes)
        print(f"{kind:28} {found}", flush=True)
        rows[kind] = f"| `{kind}` | {found} |"
    kept = [rows[kind] for kind in TYPES if kind in rows]
    count = Counter(line.split("|")[2].split()[0].strip(",:") for line in kept)
    said = f"{len(kept)} types: {count['exact']} exact, {count['refused']} refused, {count['not']} not tried."
    return f"{page}{HEAD}{said}\n\n| type | packed images |\n|---|---|\n" + "\n".join(kept) + "\n"
