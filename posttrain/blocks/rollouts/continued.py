"""Documents of the data -> the same with what a policy says in them: a reply behind the prompt of each."""

import zlib
from typing import TYPE_CHECKING

import numpy as np

from posttrain.batch import Batch
from posttrain.blocks.layout import IGNORE, Document, Example, collate_groups
from posttrain.interfaces import Sampler

if TYPE_CHECKING:
    from posttrain.run import Run


def continued(run: "Run", speaker: Sampler, batches: list[Batch], share: float, seed: int, pad_id: int) -> list[Batch]:
    """Return the micro-batches of a step with replies that the policy says.

    Which documents get one, and its random numbers, are functions of (seed, step, prompt).

    Args:
        run: in which the policy is trained.
        speaker: says the replies.
        batches: of prompts, or of whole documents; those keep what stands before their first supervised token.
        share: of the documents that get a reply; the others stay as they are.
        seed: of the run.
        pad_id: what fills rows up.

    Returns:
        One row each, with `document` and `lengths` as `collate_groups` gives them.
    """
    found = [documents(batch) for batch in batches]
    asked = [(i, j) for i, some in enumerate(found) for j in range(len(some))]
    prompts = {place: prompt(found[place[0]][place[1]]) for place in asked}
    keys = {place: (seed, run.step, zlib.crc32(np.array(ids).tobytes())) for place, ids in prompts.items()}
    chosen = [place for place in asked if np.random.default_rng(keys[place]).random() < share or share == 1]
    given: list[tuple[int, ...]] = [(*keys[place], 1) for place in chosen]
    replies = speaker.sample([prompts[place] for place in chosen], given, 1)
    for (i, j), (reply,) in zip(chosen, replies, strict=True):
        ids = np.array([*prompts[i, j], *reply.ids], dtype=np.int64)
        found[i][j] = ids, np.arange(len(ids)) >= len(prompts[i, j])
    return [collate_groups([[Example((one,)) for one in some]], pad_id=pad_id) for some in found]


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
