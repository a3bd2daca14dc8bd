"""Groups of replies -> pairs: the best and the worst of each."""

from typing import Any

import numpy as np

from posttrain.batch import Batch
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.layout import Column, Example, collate_pairs
from posttrain.blocks.rollouts.groups import laid, with_facts
from posttrain.blocks.rollouts.replies import Group

COLUMNS = {"differ": Column("example")}
"""1 for a pair, 0 for a group whose replies are worth the same."""


def pairs_of(groups: list[Group], tokenizer: Any) -> Batch:
    """Return the micro-batch of the best and the worst reply of each group, the first ones among equals.

    Returns:
        What `collate_pairs` returns, with `differ` and what `with_facts` adds. `weight` is the number of groups, the
        count `pairs` that of those whose replies differ in worth.
    """
    examples = [_example(group) for group in groups]
    batch = laid(collate_pairs, examples, tokenizer, columns=COLUMNS)
    pairs = sum(one.values["differ"] for one in examples)
    return with_facts(batch.but(counted={**batch.counted, "pairs": pairs}), groups)


def _example(group: Group) -> Example:
    known = [(reward, -i) for i, reward in enumerate(group.rewards) if reward is not None]
    best, worst = (-max(known)[1], -min(known)[1]) if not group.flat else (0, 1)
    documents = []
    for i in (best, worst):
        ids = np.array([*group.prompt, *group.replies[i].ids], dtype=np.int64)
        documents.append((ids, np.arange(len(ids)) >= len(group.prompt)))
    return Example(tuple(documents), {"differ": float(not group.flat), IMAGES: (group.images,) * 2})
