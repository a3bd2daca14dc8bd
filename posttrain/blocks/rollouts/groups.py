"""Prompts -> groups of replies -> a micro-batch.

A group's prompt is there only once, if the network's attention can branch.
"""

import statistics
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.batch import Batch, Term
from posttrain.blocks.layout import Column, Example, collate_groups
from posttrain.blocks.rollouts.prompts import MESSAGES, ROW
from posttrain.blocks.rollouts.replies import Failure, Group, Sample
from posttrain.interfaces import Sampler

if TYPE_CHECKING:
    from posttrain.run import Run

COLUMNS = {"advantages": Column("target"), "sampled": Column("target")}
"""Of each token: the advantage of its reply, and its log-probability under the sampler."""


def ask(
    run: "Run", speaker: Sampler, batches: list[Batch], n: int, seed: int, temperature: float | None = None
) -> list[list[Group]]:
    """Return n replies to each prompt of a step, batch by batch.

    The key of a prompt is (seed, step, its place among the prompts of the step, over all ranks), so that the replies
    are the same however the step is cut.
    """
    size = run.rows_per_step // (len(batches) * run.fabric.world_size)
    groups: list[list[Group]] = []
    for j, batch in enumerate(batches):
        first = (j * run.fabric.world_size + run.fabric.global_rank) * size
        groups.append(_groups(batch, first))
    every = [group for some in groups for group in some]
    _speak(run, speaker, every, [(seed, run.step, group.place) for group in every], n, temperature)
    return groups


def ask_again(run: "Run", speaker: Sampler, batch: Batch, n: int, seed: int, temperature: float | None) -> list[Group]:
    """Return n replies to each prompt of an evaluation, drawn with the same random numbers every time."""
    groups = _groups(batch, 0)
    keys: list[tuple[int, ...]] = [(seed, zlib.crc32(np.array(group.prompt).tobytes())) for group in groups]
    _speak(run, speaker, groups, keys, n, temperature)
    return groups


def _groups(batch: Batch, first: int) -> list[Group]:
    rows = zip(batch.documents(), batch[ROW], batch[MESSAGES], strict=True)
    return [Group(first + i, ids, row, messages, []) for i, ((_, ids, _), row, messages) in enumerate(rows)]


def _speak(
    run: "Run", speaker: Sampler, groups: list[Group], keys: list[tuple[int, ...]], n: int, temperature: float | None
) -> None:
    found = speaker.sample([group.prompt for group in groups], keys, n, temperature)
    for group, replies in zip(groups, found, strict=True):
        group.replies, prompt = replies, run.tokenizer.decode(group.prompt)
        texts = [run.tokenizer.decode(reply.ids, skip_special_tokens=True) for reply in replies]
        group.samples = [
            Sample(prompt, text, group.row, group.messages, one) for text, one in zip(texts, replies, strict=True)
        ]


def batch_of(groups: list[Group], *, pad_id: int, packing: bool, mask_truncated: bool) -> Batch:
    """Return the micro-batch of some groups.

    Args:
        groups: with their advantages.
        pad_id: what fills rows up.
        packing: whether documents lie side by side, and prompts are there only once; else each has a padded row.
        mask_truncated: whether nothing is learned from replies that were cut off.

    Returns:
        What `collate_groups` returns, with the count `replies`, the columns above, and what `with_facts` adds.
    """
    examples = [_example(group, mask_truncated) for group in groups]
    batch = collate_groups([examples], pad_id=pad_id, packing=packing, columns=COLUMNS)
    return with_facts(batch.but(counted={"replies": len(batch["lengths"]), **batch.counted}), groups)


def with_facts(batch: Batch, groups: list[Group]) -> Batch:
    """Return a batch with `facts`: sums of what is to be logged of groups, by name, each a mean over the count
    `NAME, known`."""
    counted, facts = dict[str, float](), dict[str, torch.Tensor]()
    for name, values in facts_of(groups).items():
        every = [one for some in values for one in some]
        counted[f"{name}, known"] = len(every)
        facts[name] = torch.tensor(float(sum(every)))
    return batch.but(counted={**batch.counted, **counted}, facts=facts)


def _example(group: Group, mask_truncated: bool) -> Example:
    """Return the documents of a group: its prompt with each of its replies."""
    known = len(group.prompt)
    documents, advantages, sampled = [], [], []
    for reply, advantage in zip(group.replies, group.advantages, strict=True):
        ids = np.array([*group.prompt, *reply.ids], dtype=np.int64)
        learned = reply.ended or not mask_truncated
        documents.append((ids, (np.arange(len(ids)) >= known) & learned))
        advantages.append(np.full(len(ids), advantage))
        sampled.append(np.array([0.0] * known + reply.log_probs))
    return Example(tuple(documents), {"advantages": tuple(advantages), "sampled": tuple(sampled)})


def facts_of(groups: list[Group]) -> dict[str, list[list[float]]]:
    """Return what is to be known of replies, by name: for each group a value of each reply, or of the group. The names
    are the same for all groups of a step, on all ranks."""
    found: dict[str, list[list[float]]] = {
        "reward": [[one for one in group.rewards if one is not None] for group in groups]
    }
    for name in groups[0].parts if groups else ():
        said = [group.parts[name] for group in groups]
        found[f"reward/{name}"] = [[one for one in some if not isinstance(one, Failure)] for some in said]
        found[f"failed/{name}"] = [[float(isinstance(one, Failure)) for one in some] for some in said]
    found["failed"] = [[float(one is None) for one in group.rewards] for group in groups]
    found["flat"] = [[float(group.flat)] for group in groups]
    found["reply/tokens"] = [[float(len(one.ids)) for one in group.replies] for group in groups]
    found["reply/cut_off"] = [[float(not one.ended) for one in group.replies] for group in groups]
    return found


def means_of(groups: list[Group]) -> dict[str, Any]:
    """Return what an evaluation knows of replies: means over groups of the means of each."""
    found = facts_of(groups)
    sums = {name: sum(statistics.fmean(some) for some in values if some) for name, values in found.items()}
    return {name: Term(torch.tensor(total), "weight", 0.0) for name, total in sums.items() if name != "flat"}
