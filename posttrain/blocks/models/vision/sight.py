"""How images enter a network: tried, as it is tried how documents are kept apart.

Short documents with no, one and two images are packed into rows of a tiny twin of the model, seen through the model's
own processor, and compared with each document alone through transformers' own network.
"""

import functools
import inspect
import json
import logging
import warnings
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from posttrain.batch import Batch
from posttrain.blocks.images.arrange import IMAGES, arrange
from posttrain.blocks.images.loading import INSTALL, load
from posttrain.blocks.images.processor import Processor, as_tensor
from posttrain.blocks.layout import lay
from posttrain.blocks.models.causal import CausalLM
from posttrain.blocks.models.documents.attention import NAME
from posttrain.blocks.models.documents.tiny import tiny
from posttrain.blocks.models.documents.trial import (
    GRADIENTS,
    LEAKS,
    WINDOW,
    Held,
    auto_of,
    close,
    gradients_differ,
    gradients_of,
    log_probs_of,
    on_the_side,
    set_attention,
)
from posttrain.blocks.models.documents.ways import Way
from posttrain.blocks.models.vision.parts import Sight, parts_of

VOCABULARY = 256
IMAGE = 1
"""The token of a twin that stands for what is seen."""
SIZES = ((), ((48, 64),), ((64, 64), (96, 40)), ((33, 57),))
"""Width and height of the images of each document."""
log = logging.getLogger("posttrain")


@attrs.frozen(eq=False)
class Seen:
    """A document with images, and what transformers makes of it alone."""

    ids: Tensor
    """int64 [tokens], of the twin."""
    spans: list[dict[str, Any]]
    images: list[Any]
    log_probs: Tensor
    gradients: list[Tensor | None]


def find_sight(hf: Any, name: str, way: Way, hub: dict[str, Any]) -> Sight | str:
    """Return how images enter a network, or why they cannot.

    Args:
        hf: of transformers.
        name: of the model, where its processor lies.
        way: how it keeps documents apart.
        hub: how the model is fetched.
    """
    parts = parts_of(hf)
    if parts is None:
        return "the model knows no images"
    said = json.dumps(hf.config.to_dict(), default=str, sort_keys=True)
    found = _find_sight(said, Held(hf.config), name, way, Held(hub))
    if isinstance(found, str):
        log.info("%s: cannot be trained on images: %s", name, found)
        return found
    how = "each image sees all of itself" if found else "images are read from left to right"
    log.info("%s: packed images give what they give alone; %s", name, how)
    return Sight(found, parts.language)


@functools.lru_cache(maxsize=64)
def _find_sight(said: str, config: Held, name: str, way: Way, hub: Held) -> bool | str:
    """Return whether the tokens of an image see each other, or why images cannot be seen."""
    from transformers import AutoTokenizer

    if way.unfolds or not way.proven:
        return f"{way} is all that keeps its documents apart, and rows with images need more"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub.config)
        processor = load(name, tokenizer, config.config, hub.config, {})
    except Exception as error:  # a processor may want any package
        return f"its processor cannot be loaded: {error}"
    if processor is None:
        return f"there is no processor of images beside the model, or Pillow is missing ({INSTALL})"
    with on_the_side():
        try:
            return tried(config.config, processor, way)
        except Exception as error:  # an architecture may want anything of its images
            log.debug("images of %s could not be tried", name, exc_info=True)
            return f"what it makes of them could not be tried: {type(error).__name__}: {str(error)[:200]}"


def tried(config: Any, processor: Processor, way: Way) -> bool | str:
    """Try images on a twin, seen from left to right and then whole."""
    problem = ""
    for blocks in (False, True):
        hf, small = twin(config, processor)
        alone = [document(hf, small, processor, number) for number in range(len(SIZES))]
        if not any(one.images for one in alone):
            return "its processor makes nothing of images"
        set_attention(hf, way.attention)
        network = CausalLM(hf)
        network.keep_apart(way)
        parts = parts_of(hf)
        assert parts is not None
        network.sight = Sight(blocks, parts.language)
        batch = packed(alone, small)
        expected = torch.cat([one.log_probs for one in alone])
        if blocks and way.attention != NAME:
            return f"{problem} (tokens of an image that see each other need attention {NAME!r})"
        if not close(network(batch, "log_probs"), expected):
            problem = LEAKS
            continue
        with torch.enable_grad():
            ours = gradients_of(hf, network(batch, "log_probs").sum())
        return GRADIENTS if gradients_differ(ours, [one.gradients for one in alone]) else blocks
    return problem


def twin(config: Any, processor: Processor) -> tuple[Any, Processor]:
    """Return a tiny network of the same architecture that takes the same images, and a processor of its tokens."""

    pixels = processor.process([noise(np.random.default_rng(0), (64, 64))])[0]

    def built(small: Any) -> Any:
        small._attn_implementation = None  # its own
        return auto_of(small).from_config(small, dtype=torch.float32).eval()

    def sees(small: Any) -> None:
        with torch.no_grad():
            built(small).base_model.get_image_features(**pixels, return_dict=True)

    small = tiny(config, vocabulary=VOCABULARY, window=WINDOW, works=sees)
    for name in ("image_token_id", "image_token_index"):
        if name in small.to_dict():
            setattr(small, name, IMAGE)
    hf = built(small)
    for parameter in hf.parameters():
        if not parameter.any():  # a projector of zeros would hide all images
            torch.nn.init.normal_(parameter, 0, 0.1)
    renamed = Processor(processor.theirs, processor.theirs.tokenizer, small, processor.said)
    return hf, renamed


def document(hf: Any, small: Processor, processor: Processor, number: int) -> Seen:
    """Return a document with images, and what transformers' own network gives for it."""
    random = np.random.default_rng(number)
    images = [noise(random, size) for size in SIZES[number]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that are turned into tensors
        given = processed(processor, images)
    whole = as_tensor(given.pop("input_ids"))
    seen = whole == processor.token_id
    words = hf.config.get_text_config().vocab_size - 3
    ids = torch.where(seen, IMAGE, 3 + whole % words)
    spans = spans_of(seen[0], [processor.expansion(size).tokens for size in SIZES[number]])
    known = inspect.signature(type(hf).forward).parameters
    given = {name: as_tensor(value) for name, value in given.items() if name in known and name != "attention_mask"}
    with torch.enable_grad():
        log_probs = log_probs_of(hf(input_ids=ids, **given, use_cache=False).logits[0], ids[0])
        gradients = gradients_of(hf, log_probs.sum())
    return Seen(ids[0], spans, images, log_probs.detach(), gradients)


def processed(processor: Processor, images: list[Any]) -> dict[str, Any]:
    """Return what transformers' processor makes of a text with images; some refuse one without."""
    theirs, anchor = processor.theirs, processor.token
    text = "The first words, " + "".join(f"then {anchor} and more of them, " for _ in images) + "and the last words."
    if not images:
        return dict(theirs.tokenizer([text], return_tensors="np"))
    return dict(theirs(text=[text], images=images, return_mm_token_type_ids=True, return_tensors=processor.made_as))


def spans_of(seen: Tensor, tokens: list[int]) -> list[dict[str, Any]]:
    """Return where images stand, of whose tokens the network replaces so many."""
    places = seen.nonzero()[:, 0].tolist()
    assert len(places) == sum(tokens), "a processor's tokens depend on more than the size of an image"
    found, at = list[dict[str, Any]](), 0
    for count in tokens:
        found.append({"at": places[at], "tokens": count, "number": len(found)})
        at += count
    return found


def noise(random: np.random.Generator, size: tuple[int, int]) -> Any:
    """Return an image of random pixels."""
    from PIL.Image import fromarray

    return fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def packed(alone: list[Seen], processor: Processor) -> Batch:
    """Return the documents in two rows, of which one has padding."""
    laid = [(one.ids.numpy(), np.ones(len(one.ids), dtype=bool)) for one in alone]
    batch = lay([[laid[0], laid[1], laid[2]], [laid[3]]], 0)
    spans = [[span | {"document": n} for span in one.spans] for n, one in enumerate(alone)]
    made = arrange(batch, spans, processor, lambda span: alone[span["document"]].images[span["number"]])
    assert IMAGES in made.arguments
    return made
