"""What images take, for a plan: a micro-batch full of them, and tensors without numbers of which some are known.

How large the images are decides what a tower does, so their sizes stay numbers while everything else has none.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from posttrain.batch import Batch, Extra, Layout
from posttrain.blocks.data.data import Data
from posttrain.blocks.data.encoding.encoders import apart
from posttrain.blocks.data.rows.refused import Refused
from posttrain.blocks.data.sources import Source
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.images.processor import images_of
from posttrain.blocks.layout import Example
from posttrain.blocks.models.model import HFModel
from posttrain.trainer import Trainer

LOOKED_AT = 64
"""Rows of each source in which images are looked for."""
CONSTANTS = 100_000
"""Numbers in a tensor of whole ones that is computed with while tracing: torch itself knows single ones alone."""
UNKNOWN = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
"""What a network raises that looks at numbers which are not there."""


def fullest_of_images(trainer: Trainer, length: int) -> Batch | None:
    """Return a micro-batch with as many images as its rows can hold of those of the data; None if there are none.

    Args:
        trainer: of the recipe.
        length: tokens of a document that a rank sees.
    """
    found = row_of_images(trainer, length)
    return None if found is None else found[0].collator(found[1])([found[2]] * trainer.micro_batch_size, 1)


def prompt_of_images(trainer: Trainer, length: int) -> tuple[Example, Any] | None:
    """Return the prompt with the most images for its length, which are read, and the tokenizer; None without images."""
    found = row_of_images(trainer, length)
    if found is None:
        return None
    data, tokenizer, (prompt, *_) = found
    (spans,) = data.collator(tokenizer)([[prompt]], 1)[IMAGES]
    return attrs.evolve(prompt, values={IMAGES: (spans,)}), tokenizer


def row_of_images(trainer: Trainer, length: int) -> tuple[Data, Any, list[Example]] | None:
    """Return the data block, the tokenizer, and a row that is full of images; None if there are none."""
    data, model = trainer.data, trainer.model
    if not isinstance(data, Data) or not isinstance(model, HFModel) or not model.sees_images():
        return None
    tokenizer = trainer.tokenizer.build(model)
    row = with_images(data, tokenizer, length)
    return (data, tokenizer, row) if row else None


def with_images(data: Data, tokenizer: Any, length: int) -> list[Example]:
    """Return a row that is full of the example with the most images for its length among the first rows of the data;
    none if they have no images."""
    best: tuple[float, Example] | None = None
    encoder, images = data.encoder(tokenizer), images_of(tokenizer)
    if images is None:
        return []
    for source in data.sources:
        rows = [row.values for row, _ in itertools.islice(source.read(source.open()), LOOKED_AT)]
        for found in encoder.encode(rows):
            if isinstance(found, Refused) or max(len(ids) for ids, _ in found.documents) > length:
                continue
            for one in apart(found, encoder.sides, encoder.columns):
                here = with_source(one, source)
                tokens = sum(span["tokens"] for spans in here.values.get(IMAGES, ()) for span in spans)
                if tokens and (best is None or tokens / len(one) > best[0]):
                    best = tokens / len(one), here
    if best is None:
        return []
    documents = tuple((ids, ids != images.token_id) for ids, _ in best[1].documents)  # supervised, as can be
    return [attrs.evolve(best[1], documents=documents)] * max(1, data.row_length // len(best[1]))


def with_source(example: Example, source: Source) -> Example:
    """Return an example whose images know where their rows are."""
    spans = tuple([span | {"source": source} for span in one] for one in example.values.get(IMAGES, ()))
    return attrs.evolve(example, values=example.values | ({IMAGES: spans} if spans else {}))


def faked(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Return a batch without numbers; with images, tokens and their sizes stay known, since networks look at them."""

    def constant(x: Tensor) -> Any:
        return x if x.is_floating_point() else mode.fake_tensor_converter.from_real_tensor(mode, x, make_constant=True)

    def known(layout: Layout) -> dict[str, Any]:
        tensors = layout.arguments[IMAGES].values
        tensors = tensors(layout.input_ids.device) if callable(tensors) else tensors
        images = {name: constant(x) for name, x in tensors.items()}
        arguments = {**layout.arguments, IMAGES: Extra(images)}
        return {"input_ids": constant(layout.input_ids), "arguments": arguments}

    if IMAGES in batch.arguments:
        branch = batch.branch and attrs.evolve(batch.branch, **known(batch.branch))
        batch = attrs.evolve(batch, branch=branch, **known(batch))
    return batch.map(lambda x: x if isinstance(x, FakeTensor) else mode.from_tensor(x))


@contextmanager
def constants() -> Iterator[None]:
    """Compute with small tensors of whole numbers meanwhile: the sizes of images decide what a tower does."""
    before = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = CONSTANTS
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = before
