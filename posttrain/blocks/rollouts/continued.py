"""Documents of the data -> the same with what a policy says in them: a reply behind the prompt of each."""

import zlib
from typing import TYPE_CHECKING

import numpy as np

from posttrain.batch import Batch
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.layout import IGNORE, Document, Example, collate_groups
from posttrain.blocks.rollouts.groups import laid, replies_to
from posttrain.blocks.rollouts.replies import Group
from posttrain.errors import TrainingError
from posttrain.interfaces import Sampler

if TYPE_CHECKING:
    from posttrain.run import Run

WITH_REPLIES = "data: it holds images, and the student is shown those of prompts alone: take `type: prompts`"


def continued(run: "Run", speaker: Sampler, batches: list[Batch], share: float, seed: int) -> list[Batch]:
    """Return the micro-batches of a step with replies that the policy says.

    Which documents get one, and its random numbers, are functions of (seed, step, prompt).

    Args:
        run: in which the policy is trained.
        speaker: says the replies.
        batches: of prompts, or of whole documents; those keep what stands before their first supervised token.
        share: of the documents that get a reply; the others stay as they are.
        seed: of the run.

    Returns:
        One row each, with `document` and `lengths` as `collate_groups` gives them.

    Raises:
        TrainingError: whole documents hold images.
    """
    if any(IMAGES in batch.arguments for batch in batches):
        raise TrainingError(WITH_REPLIES)
    found = [documents(batch) for batch in batches]
    seen = [batch.get(IMAGES) or [[] for _ in some] for batch, some in zip(batches, found, strict=True)]
    asked = [(i, j) for i, some in enumerate(found) for j in range(len(some))]
    groups = {(i, j): Group(0, prompt(found[i][j]), {}, [], [], images=seen[i][j]) for i, j in asked}
    keys = {place: (seed, run.step, zlib.crc32(group.identity)) for place, group in groups.items()}
    chosen = [place for place in asked if np.random.default_rng(keys[place]).random() < share or share == 1]
    given: list[tuple[int, ...]] = [(*keys[place], 1) for place in chosen]
    prompts, images = [groups[place].prompt for place in chosen], [groups[place].images for place in chosen]
    for (i, j), (reply,) in zip(chosen, replies_to(speaker, prompts, images, given, 1), strict=True):
        ids = np.array([*groups[i, j].prompt, *reply.ids], dtype=np.int64)
        found[i][j] = ids, np.arange(len(ids)) >= len(groups[i, j].prompt)
    made = [
        [Example((one,), {IMAGES: (images,)}) for one, images in zip(some, shown, strict=True)]
        for some, shown in zip(found, seen, strict=True)
    ]
    return [laid(collate_groups, some, run.tokenizer, columns={}) for some in made]


def documents(batch: Batch) -> list[Document]:
    """Return the documents of a batch, each with which of its tokens are supervised."""
    ids, labels = (x.flatten().cpu().numpy() for x in (batch.input_ids, batch.labels))
    width, start, found = batch.input_ids.shape[-1], 0, list[Document]()
    for end in sorted(batch.ends.tolist()):
        start = max(start, end // width * width)
        found.append((ids[start : end + 1], labels[start : end + 1] != IGNORE))
        start = end + 1
    return found


def prompt(document: Document) -> list[int]:
    """Return what stands before the first supervised token; all of it, if there is none."""
    ids, mask = document
    first = int(mask.argmax()) if mask.any() else len(ids)
    begin: list[int] = ids[:first].tolist()
    return begin
