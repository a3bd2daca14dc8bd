"""What a model of images wants of them: the processor of transformers, on Pillow alone, and what it makes of an image.

How many tokens an image becomes depends on its size and on nothing else, so that rows can be tokenized, packed and cut
without pixels. A processor is asked about each size once.
"""

import copy
import inspect
import json
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

UNSEEN = ("video_processor", "feature_extractor", "audio_processor")
"""Parts of a processor that are for videos and sound."""
GREY = (90, 120, 30)
"""Of the images that a processor is asked about: some models take black ones for padding."""


@attrs.frozen
class Expansion:
    """What the placeholder of an image of some size becomes."""

    text: str
    tokens: int
    """How many of its tokens the network replaces by what it sees."""
    shrunk: bool
    """Whether the network sees fewer pixels than the image has."""


class Processor:
    """The processor of a model of images and text."""

    def __init__(self, theirs: Any, tokenizer: Any, config: Any, said: dict[str, Any]) -> None:
        """Wrap a processor of transformers.

        Args:
            theirs: the processor; it gets a copy of the tokenizer.
            tokenizer: of the run.
            config: of the model.
            said: what the processor was made of.

        Raises:
            RecipeError: the processor does not say what becomes of the place of one image.
        """
        from transformers import ProcessorMixin

        if not hasattr(theirs, "image_token") or type(theirs).replace_image_token is ProcessorMixin.replace_image_token:
            raise RecipeError(f"{type(theirs).__name__} does not say what becomes of the place of one image alone")
        self.theirs, self.config, self.said = theirs, config, said
        theirs.tokenizer = copy.copy(tokenizer)
        theirs.chat_template = tokenizer.chat_template
        self.token = str(getattr(theirs, "image_placeholder_token", theirs.image_token))
        """What a chat template writes where an image stands."""
        self.token_id = image_token_of(config)
        """What the network replaces by what it sees."""
        self.known: dict[tuple[int, int], Expansion] = {}
        self.lock = threading.Lock()

    @cached_property
    def skeleton(self) -> Any:
        """The model without weights: it knows its positions, and what it takes of an image."""
        import torch
        import transformers

        with torch.device("meta"):
            return transformers.AutoModelForImageTextToText.from_config(self.config)

    @cached_property
    def taken(self) -> set[str]:
        """Names of what the network takes of images."""
        return {*inspect.signature(self.skeleton.base_model.get_image_features).parameters, "image_grid_thw"}

    @cached_property
    def made_as(self) -> str:
        """What its processor of images makes, as transformers calls it."""
        from transformers.image_processing_backends import PilBackend

        return "np" if isinstance(self.theirs.image_processor, PilBackend) else "pt"  # else it copies pixel by pixel

    def process(self, images: "list[Image]") -> "tuple[dict[str, Tensor], list[str]]":
        """Return the tensors of images that the network takes, and what the placeholder of each becomes."""
        said = self.theirs._merge_kwargs(return_tensors=self.made_as)
        wanted = inspect.signature(self.theirs._process_images).parameters.values()
        more = {one.name: said[one.name] for one in wanted if one.kind is not one.VAR_KEYWORD and one.name in said}
        text = [self.token * len(images)]  # one document, which some processors want to know
        nested = self.theirs.prepare_inputs_layout(images=list(images), text=text)[0]
        found, texts = self.theirs._process_images(nested, **more, **said["images_kwargs"])
        if "pixel_values" not in found:
            raise RecipeError(f"{type(self.theirs).__name__} makes {', '.join(found)} of images, and no pixel_values")
        return {name: as_tensor(found[name]) for name in found if name in self.taken}, texts

    def expansion(self, size: tuple[int, int]) -> Expansion:
        """Return what the placeholder of an image of a size becomes, in pixels of width and height."""
        from PIL.Image import new

        with self.lock:
            if size not in self.known:
                tensors, (text,) = self.process([new("RGB", size, GREY)])
                ids = self.theirs.tokenizer(text, add_special_tokens=False)["input_ids"]
                frames = getattr(self.theirs.image_processor, "temporal_patch_size", 1)  # an image is shown so often
                seen = tensors["pixel_values"].numel() // 3 // frames
                self.known[size] = Expansion(text, ids.count(self.token_id), seen < size[0] * size[1])
            return self.known[size]

    def positions(self, ids: "Tensor", grids: "Tensor") -> "Tensor":
        """Return the positions of a document's tokens, [axes, tokens], for a model that has several axes of them.

        Args:
            ids: int64 [tokens].
            grids: of its images, as the processor gives them.
        """
        kinds = (ids == self.token_id).long()
        found = self.skeleton.base_model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grids)
        positions: Tensor = found[0][:, 0]
        return positions

    @cached_property
    def has_axes(self) -> bool:
        """Whether positions of images have several axes (time, height and width)."""
        return hasattr(self.skeleton.base_model, "get_rope_index")

    @property
    def controls(self) -> set[str]:
        """Control tokens that stand for images and what surrounds them."""
        special = {str(t.content) for t in self.theirs.tokenizer.added_tokens_decoder.values() if t.special}
        text = self.expansion((64, 64)).text
        return {token for token in special if token in text} | {self.token}

    def fingerprint(self) -> str:
        """Return what decides how images are processed, as text."""
        made = {**self.theirs.to_dict(), "image_processor": self.theirs.image_processor.to_dict(), "tokenizer": None}
        tried = [self.expansion(size).text for size in ((64, 64), (33, 200))]
        return json.dumps([type(self.theirs).__name__, made, self.token_id, tried], default=str, sort_keys=True)

    def save_pretrained(self, folder: Path) -> None:
        """Write what `AutoProcessor` loads, chat template included; parts for videos and sound are as they were."""
        self.theirs.save_pretrained(folder)
        file = Path(folder) / "processor_config.json"
        written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if missing := {n: v for n, v in self.said.items() if n in UNSEEN and n not in written}:
            file.write_text(json.dumps(written | missing, indent=2) + "\n", encoding="utf-8")


def as_tensor(values: Any) -> "Tensor":
    """Return an array as a tensor; a processor may give a list of them. Llama 4's makes pixels of bfloat16."""
    import numpy as np
    import torch

    if isinstance(values, torch.Tensor):
        return values.float() if values.is_floating_point() else values
    return torch.from_numpy(np.ascontiguousarray(values))


class Seeing:
    """Mixed into the class of a tokenizer whose model sees images: it has their processor, and saves it."""

    images: Processor

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save tokenizer and processor."""
        found = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        self.images.save_pretrained(Path(save_directory))
        return found


def seeing(tokenizer: Any, images: Processor) -> Any:
    """Return a tokenizer that knows the processor of its model's images.

    Its class is changed, which keeps its name, since transformers writes that into files.
    """
    kind = type(tokenizer)
    tokenizer.__class__ = type(kind.__name__, (Seeing, kind), {"__module__": kind.__module__})
    tokenizer.images = images
    return tokenizer


def images_of(tokenizer: Any) -> Processor | None:
    """Return the processor of the images of a tokenizer's model, if it sees any."""
    return tokenizer.images if isinstance(tokenizer, Seeing) else None


def image_token_of(config: Any) -> int:
    """Return the token that a network replaces by what it sees."""
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)
