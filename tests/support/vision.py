"""Tiny models of images and text of eight families, each saved like a downloaded one, processor included; and pictures."""

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokens import byte_tokenizer

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "head_dim": 8, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.2, "initializer_factor": 4.0,
}  # fmt: skip
QWEN = {"min_pixels": 256, "max_pixels": 4096, "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava", "idefics3", "smolvlm", "gemma3", "internvl", "mistral3")
PLACES = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>", "idefics3": "<image>", "smolvlm": "<image>", "gemma3": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>", "mistral3": "[IMG]",
}  # fmt: skip
"""What each template writes where an image stands."""
WORDS = {
    "qwen": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "llava": ["<image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))],
    "gemma3": ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
    "internvl": ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
    "mistral3": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
}  # fmt: skip
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}PLACE{% else %}\
{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


SIZES = ((40, 24), (64, 64), (33, 57), (96, 40))
"""Width and height of the pictures of `prompts`."""


def tokenizer_of(family: str) -> Any:
    """A byte tokenizer with the family's control tokens and a template that knows where images stand."""
    group = "qwen" if family.startswith("qwen") else "idefics3" if family == "smolvlm" else family
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>", *WORDS[group]]
    made = byte_tokenizer(TEMPLATE.replace("PLACE", PLACES[family]), special)
    extra = {
        "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                     "video_token": "<video>"},
        "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "smolvlm": {}, "idefics3": {},
    }.get(family, {})  # fmt: skip
    if extra:
        made.add_special_tokens({}) if False else None
        for name, token in extra.items():
            setattr(made, name, token)
            setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
            made.init_kwargs[name] = token
        made.init_kwargs["extra_special_tokens"] = extra
        made._special_tokens_map.update(extra) if family in ("gemma3", "internvl") else None
    return made


def config_of(family: str, tokenizer: Any) -> Any:
    """A configuration small enough for a test."""
    import transformers as t

    size = {"vocab_size": len(tokenizer)}

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    if family == "qwen2_5_vl":
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "initializer_range": 0.2,
        }  # fmt: skip
        return t.Qwen2_5_VLConfig(
            text_config={**TEXT, **size, "rope_parameters": MROPE}, vision_config=vision,
            image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
    if family == "qwen3_5":  # gated delta rule and attention in turns
        linear = {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
            "initializer_range": 0.2,
        }  # fmt: skip
        return t.Qwen3_5Config(
            text_config={**TEXT, **size, **linear, "layer_types": ["linear_attention", "full_attention"],
                         "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}},
            vision_config=vision, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
    if family == "qwen3_vl":
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1], "initializer_range": 0.2,
        }  # fmt: skip
        return t.Qwen3VLConfig(
            text_config={**TEXT, **size, "num_hidden_layers": 3, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
            vision_config=vision, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
    if family == "llava":
        return t.LlavaConfig(
            text_config={"model_type": "llama", **TEXT, **size}, vision_config={"model_type": "clip_vision_model", **TOWER,
            "projection_dim": 32}, image_token_id=token("<image>"), image_seq_length=16,
        )  # fmt: skip
    if family in ("idefics3", "smolvlm"):
        kind = t.Idefics3Config if family == "idefics3" else t.SmolVLMConfig
        return kind(
            text_config={"model_type": "llama", **TEXT, **size}, vision_config=TOWER, image_token_id=token("<image>"),
            scale_factor=2, pad_token_id=token("<|pad|>"),
        )  # fmt: skip
    if family == "gemma3":
        return t.Gemma3Config(
            text_config={**TEXT, **size, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"],
                         "query_pre_attn_scalar": 8},
            vision_config={"model_type": "siglip_vision_model", **TOWER}, mm_tokens_per_image=4,
            image_token_id=token("<image_soft_token>"), boi_token_index=token("<start_of_image>"),
            eoi_token_index=token("<end_of_image>"),
        )  # fmt: skip
    if family == "internvl":
        return t.InternVLConfig(
            text_config={"model_type": "qwen2", **TEXT, **size},
            vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}, downsample_ratio=0.5,
            image_token_id=token("<IMG_CONTEXT>"), image_seq_length=4,
        )  # fmt: skip
    assert family == "mistral3"
    return t.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, **size, "sliding_window": None},
        vision_config={"model_type": "pixtral", **TOWER, "image_size": 64, "head_dim": 8}, spatial_merge_size=2,
        image_token_id=token("[IMG]"),
    )  # fmt: skip


def processor_of(family: str, tokenizer: Any) -> Any:
    """A processor of transformers for it, on Pillow."""
    from posttrain.blocks.images.loading import class_of

    def pil(module: str, name: str, **keys: Any) -> Any:
        import importlib

        return getattr(importlib.import_module(f"transformers.models.{module}"), name)(**keys)

    if family.startswith("qwen"):
        images = pil("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil", **QWEN)
        return class_of("Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen3VLProcessor")(images, tokenizer)
    if family == "llava":
        images = pil(
            "clip.image_processing_pil_clip", "CLIPImageProcessorPil", size={"shortest_edge": 32}, crop_size=32
        )
        return class_of("LlavaProcessor")(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                                        num_additional_image_tokens=1)  # fmt: skip
    if family in ("idefics3", "smolvlm"):
        module, name = ("idefics3", "Idefics3") if family == "idefics3" else ("smolvlm", "SmolVLM")
        images = pil(f"{module}.image_processing_pil_{module}", f"{name}ImageProcessorPil", size={"longest_edge": 64},
                     max_image_size={"longest_edge": 32})  # fmt: skip
        videos = {"video_processor": None} if name == "SmolVLM" else {}  # which it wants to be told
        return class_of(f"{name}Processor")(images, tokenizer, image_seq_len=4, **videos)
    if family == "gemma3":
        images = pil("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil", size={"height": 32, "width": 32})
        return class_of("Gemma3Processor")(images, tokenizer, image_seq_length=4)
    if family == "internvl":
        images = pil("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil", size={"height": 32, "width": 32},
                     crop_to_patches=True, max_patches=4)  # fmt: skip
        return class_of("InternVLProcessor")(images, tokenizer, image_seq_length=4)
    images = pil(
        "pixtral.image_processing_pil_pixtral", "PixtralImageProcessorPil", size={"longest_edge": 64}, patch_size=8
    )
    return class_of("PixtralProcessor")(images, tokenizer, patch_size=8, spatial_merge_size=2)


def models(folders: Any) -> Callable[[str], Path]:
    """Return what gives the folder of a family's model, made when it is first asked for; `folders` makes folders."""
    return cache(lambda family: make(family, folders.mktemp(family)))


def make(family: str, folder: Path) -> Path:
    """Save a model with random weights, its processor and its tokenizer."""
    import torch
    import transformers

    tokenizer = tokenizer_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config_of(family, tokenizer))
        for parameter in model.parameters():
            if not parameter.any():  # such as the projector of Gemma 3, which would hide all images
                torch.nn.init.normal_(parameter, 0, 0.1)
    model.save_pretrained(folder)
    made = processor_of(family, tokenizer)
    made.chat_template = tokenizer.chat_template
    made.save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> Any:
    """A picture of random pixels, some of them alike."""
    from PIL import Image

    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size)


def opened(file: Path) -> Any:
    """A picture of a file, in RGB."""
    from PIL import Image

    return Image.open(file).convert("RGB")


def prompts(folder: Path) -> Path:
    """A file of prompts with one, no and two images: in a column, in the row itself, and with text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{n}.png" for n in range(len(SIZES))]
    for n, file in enumerate(files):
        picture(n, SIZES[n]).save(file)
    inline = base64.b64encode(files[2].read_bytes()).decode()
    parts = [{"type": "image", "base64": inline}, {"type": "text", "text": "this?"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "<image> what?", "images": ["0.png"], "answer": "a"},
        {"messages": [{"role": "user", "content": "say no"}], "answer": "b"},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}], "answer": "c"},
        {"prompt": "<image> or <image>?", "images": ["1.png", "3.png"], "answer": "d"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl"


SHOWN: dict[str, list[int]] = {"a": [0], "b": [], "c": [2], "d": [1, 3]}
"""The answer that such a prompt wants -> the numbers of its images."""
