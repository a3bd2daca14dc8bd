"""The images of a batch: pixels, positions and blocks of tokens, as networks take them.

Everything is worked out on the host from where images stand in the rows, as all is that tells documents apart.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.batch import Batch, Extra
from posttrain.blocks.images.processor import Processor
from posttrain.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

IMAGES, BLOCKS = "images", "image_blocks"
"""Arguments of a network: the tensors that it sees images by, and for each token the number of its image, or -1."""


def arrange(
    batch: Batch, spans: list[list[dict[str, Any]]], processor: Processor, read: "Callable[[Any], Image]"
) -> Batch:
    """Return a batch with its images; where documents branch, what they have in common is there once.

    Args:
        batch: as a collator laid it.
        spans: of each document: where its images stand, with `at`, and `tokens`, how many the network replaces.
        processor: of the model.
        read: span -> its image.

    Raises:
        DataError: a placeholder stands for no image, or an image has not all of its tokens.
    """
    ids = batch.input_ids.numpy().reshape(-1)
    bounds = documents(batch)
    found = [(begin + span["at"], span) for (begin, _), each in zip(bounds, spans, strict=True) for span in each]
    placed = int((ids == processor.token_id).sum())
    if placed != (wanted := sum(span["tokens"] for _, span in found)):
        raise DataError(f"the rows of a batch hold {placed} tokens of images, and their images have {wanted}")
    if not found:
        return batch
    images = [read(span) for _, span in found]
    tensors = processor.process(images)[0]
    counts = [len(each) for each in spans]
    blocks = blocks_of(ids, bounds, processor.token_id).reshape(batch.input_ids.shape)
    positions = batch.position_ids
    if processor.has_axes:
        positions = axes(batch, bounds, counts, tensors, processor)
    made = attrs.evolve(
        batch,
        position_ids=positions,
        arguments={**batch.arguments, IMAGES: Extra(tensors), BLOCKS: Extra(blocks, "token")},
    )
    if batch.branch is None:
        return made
    taken = batch.branch.taken
    assert taken is not None
    there = set(taken.tolist())
    own = [image for (at, _), image in zip(found, images, strict=True) if at in there]
    branch = attrs.evolve(
        batch.branch,
        position_ids=positions.flatten(-2)[..., taken].unsqueeze(-2),
        arguments={
            **batch.branch.arguments,
            IMAGES: Extra(tensors if len(own) == len(images) else processor.process(own)[0]),
            BLOCKS: Extra(blocks.flatten()[taken][None], "token"),
        },
    )
    return attrs.evolve(made, branch=branch)


def documents(batch: Batch) -> list[tuple[int, int]]:
    """Return where each document but padding begins and ends, counted over rows * width."""
    ends = {end + 1 for end in batch.ends.tolist()}
    return [(begin, end) for begin, end in pairwise(batch.bounds) if end in ends]


def blocks_of(ids: "np.ndarray", bounds: list[tuple[int, int]], token: int) -> "Tensor":
    """Return for each token which stretch of image tokens of its document it belongs to, or -1: int64 [tokens]."""
    import numpy as np
    import torch

    seen = ids == token
    begins = seen & ~np.concatenate([[False], seen[:-1]])
    first = np.array([begin for begin, _ in bounds])
    begins[first] |= seen[first]
    return torch.from_numpy(np.where(seen, np.cumsum(begins) - 1, -1))


def axes(
    batch: Batch, bounds: list[tuple[int, int]], counts: list[int], tensors: "dict[str, Tensor]", processor: Processor
) -> "Tensor":
    """Return positions for a model with several axes of them: [1 + axes, rows, width], text first.

    Args:
        batch: with positions of one axis.
        bounds: of its documents.
        counts: images of each.
        tensors: of all images, `image_grid_thw` among them.
        processor: knows how a document's tokens lie on the axes.
    """
    ids, plain, at = batch.input_ids.flatten(), batch.position_ids.flatten(), 0
    made: Tensor | None = None
    for (begin, end), count in zip(bounds, counts, strict=True):
        if count:
            found = processor.positions(ids[begin:end], tensors["image_grid_thw"][at : at + count])
            if made is None:
                made = plain.expand(1 + len(found), -1).clone()
            made[1:, begin:end] = found
            at += count
    assert made is not None
    return made.view(-1, *batch.input_ids.shape)
