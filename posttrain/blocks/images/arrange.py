"""The images of a batch: pixels, positions and blocks of tokens, as networks take them.

Everything is worked out on the host from where images stand in the rows, as all is that tells documents apart.
"""

import functools
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
PICTURE = "picture"
"""Of a stored span whose image was read: the image."""


def shown(batch: Batch, processor: Processor, read: "Callable[[Any], Image]") -> Batch:
    """Return a batch with the images that its column of spans names, and their number among its counts."""
    extra = dict(batch.extra)
    spans = extra.pop(IMAGES).values
    counted = {**batch.counted, IMAGES: sum(map(len, spans))}
    return arrange(attrs.evolve(batch, extra=extra, counted=counted), spans, processor, read)


def shown_to_policy(batch: Batch, processor: Processor) -> Batch:
    """Return a batch of replies with the images of their prompts.

    A placeholder in a reply stands for no image. It is the end of the reply (`ends_of` in rollouts/in_process.py), so
    that nothing depends on what the network reads there; but it must not look for an image.
    """
    if not any(batch[IMAGES]):
        extra = {name: value for name, value in batch.extra.items() if name != IMAGES}
        return attrs.evolve(batch, extra=extra, counted={**batch.counted, IMAGES: 0})
    ids, token = batch.input_ids.flatten(), processor.token_id
    said = ids == token
    for (begin, _), spans in zip(documents(batch), batch[IMAGES], strict=True):
        for span in spans:
            said[begin + span["at"] : begin + span["at"] + span["length"]] = False
    if said.any():
        ids = ids.masked_fill(said, int(token == 0))
        branch = batch.branch and attrs.evolve(batch.branch, input_ids=ids[batch.branch.taken][None])
        batch = attrs.evolve(batch, input_ids=ids.view(batch.input_ids.shape), branch=branch)
    return shown(batch, processor, lambda span: span[PICTURE])


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
    taken = None if batch.branch is None else batch.branch.taken
    there = None if taken is None else set(taken.tolist())
    own = [(n, span) for n, (at, span) in enumerate(found) if there is None or at in there]
    number = {span.get("hash", n): i for i, (n, span) in enumerate(own)}
    which = [number[span.get("hash", n)] for n, (_, span) in enumerate(found)]  # of those once, for all
    images = [read(span) for _, span in own]
    tensors = processor.process(images)[0]
    blocks = blocks_of(ids, bounds, processor.token_id).reshape(batch.input_ids.shape)
    positions = batch.position_ids
    if processor.has_axes:
        positions = axes(batch, bounds, [len(each) for each in spans], tensors["image_grid_thw"][which], processor)
    whole = tensors if len(own) == len(found) else later(processor, [images[i] for i in which])
    made = attrs.evolve(
        batch,
        position_ids=positions,
        arguments={**batch.arguments, IMAGES: Extra(whole), BLOCKS: Extra(blocks, "token")},
    )
    if batch.branch is None:
        return made
    branch = attrs.evolve(
        batch.branch,
        position_ids=positions.flatten(-2)[..., taken].unsqueeze(-2),
        arguments={
            **batch.branch.arguments,
            IMAGES: Extra(tensors),
            BLOCKS: Extra(blocks.flatten()[taken][None], "token"),
        },
    )
    return attrs.evolve(made, branch=branch)


def later(processor: Processor, images: "list[Image]") -> "Callable[[Any], dict[str, Tensor]]":
    """Return what makes the tensors of images on a device: for networks that cannot branch, and see the images of
    what is said alike in each document. Eight replies would make and move them eight times, and mostly for nothing."""
    return functools.cache(lambda device: {name: x.to(device) for name, x in processor.process(images)[0].items()})


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
    batch: Batch, bounds: list[tuple[int, int]], counts: list[int], grids: "Tensor", processor: Processor
) -> "Tensor":
    """Return positions for a model with several axes of them: [1 + axes, rows, width], text first.

    Args:
        batch: with positions of one axis.
        bounds: of its documents.
        counts: images of each.
        grids: of all images, as the processor gives them.
        processor: knows how a document's tokens lie on the axes.
    """
    ids, plain, at = batch.input_ids.flatten(), batch.position_ids.flatten(), 0
    made: Tensor | None = None
    for (begin, end), count in zip(bounds, counts, strict=True):
        if count:
            found = processor.positions(ids[begin:end], grids[at : at + count])
            if made is None:
                made = plain.expand(1 + len(found), -1).clone()
            made[1:, begin:end] = found
            at += count
    assert made is not None
    return made.view(-1, *batch.input_ids.shape)
