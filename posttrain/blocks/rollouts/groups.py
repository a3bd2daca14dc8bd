"""Prompts -> groups of replies -> a micro-batch.

A group's prompt is there only once, if the network's attention can branch.
"""

import statistics
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from posttrain.batch import Batch, Term
from posttrain.blocks.data.data import pad_id
from posttrain.blocks.data.rows.media import images_of
from posttrain.blocks.images.arrange import IMAGES, PICTURE, shown_to_policy
from posttrain.blocks.images.processor import images_of as processor_of
from posttrain.blocks.layout import Column, Columns, Example, collate_groups
from posttrain.blocks.rollouts.prompts import CONVERSATION, MESSAGES, ROW
from posttrain.blocks.rollouts.replies import Failure, Group, Reply, Sample
from posttrain.errors import TrainingError
from posttrain.interfaces import Sampler, SeeingSampler

if TYPE_CHECKING:
    from posttrain.run import Run

TEXT_ALONE = "sampler: it takes text alone, and the data holds images: take `type: transformers`"
COLUMNS = {"advantages": Column("target"), "sampled": Column("target")}
"""Of each token: the advantage of its reply, and its log-probability under the sampler."""


Answer: TypeAlias = Callable[[list[Group], list[tuple[int, ...]], int, float | None], list[list[Reply]]]
"""Groups, the key of each, a number and a temperature -> so many replies to the prompt of each."""


def asked(run: "Run", batches: list[Batch]) -> list[list[Group]]:
    """Return the prompts of a step, batch by batch, each with its place among all of the step, over all ranks: what is
    said to it depends on that place, and not on how the step is cut."""
    size = run.rows_per_step // (len(batches) * run.fabric.world_size)
    groups: list[list[Group]] = []
    for j, batch in enumerate(batches):
        first = (j * run.fabric.world_size + run.fabric.global_rank) * size
        groups.append(groups_in(batch, first))
    return groups


def keys_of(groups: list[Group], seed: int) -> list[tuple[int, ...]]:
    """Return the key of each prompt of an evaluation, which draws the same random numbers every time."""
    return [(seed, zlib.crc32(group.identity)) for group in groups]


def groups_in(batch: Batch, first: int = 0) -> list[Group]:
    """Return the prompts of a batch, without replies."""
    images = batch.get(IMAGES) or [[] for _ in batch[ROW]]
    rows = zip(batch.documents(), batch[ROW], batch[MESSAGES], batch[CONVERSATION], images, strict=True)
    return [
        Group(first + i, ids, row, with_images(messages, seen), [], conversation, seen)
        for i, ((_, ids, _), row, messages, conversation, seen) in enumerate(rows)
    ]


def with_images(messages: list[dict[str, Any]], seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose image parts say what they are: path or address if they have one, hash and size."""
    known = iter(map(reference, seen))
    return [
        each | {"content": [part | next(known) if part.get("type") == "image" else part for part in each["content"]]}
        if images_of(each) else each for each in messages
    ]  # fmt: skip


def reference(image: dict[str, Any]) -> dict[str, Any]:
    """Return what names an image, without its pixels."""
    return {name: image[name] for name in ("path", "url", "hash", "size") if name in image}


def speak(
    run: "Run",
    answer: Answer,
    groups: list[Group],
    keys: list[tuple[int, ...]],
    n: int,
    temperature: float | None = None,
) -> None:
    """Give every group n replies to its prompt. All ranks call it."""
    found = answer(groups, keys, n, temperature)
    for group, replies in zip(groups, found, strict=True):
        group.replies, prompt = replies, prompt_of(run, group)
        pictures = [image[PICTURE] for image in group.images]
        group.samples = [
            Sample(prompt, text_of(run, reply), group.row, group.messages, reply, pictures) for reply in replies
        ]


def prompt_of(run: "Run", group: Group) -> str:
    """Return a prompt as text, with one token for each of its images."""
    ids, processor = list(group.prompt), processor_of(run.tokenizer)
    for image in reversed(group.images):
        assert processor is not None, "who has read them knows them"
        ids[image["at"] : image["at"] + image["length"]] = [processor.token_id]
    return str(run.tokenizer.decode(ids))


def holds_images(run: "Run") -> bool:
    """Whether the data of a run is known to hold images; of a stream nothing is known before."""
    ledger = run.loaders.ledger
    return any(part.get("total", {}).get(IMAGES) for part in (ledger, ledger.get("eval", {})))


def replies_to(
    speaker: Sampler, prompts: list[list[int]], images: list[list[dict[str, Any]]], keys: list[tuple[int, ...]], n: int,
    temperature: float | None = None,
) -> list[list[Reply]]:  # fmt: skip
    """Return n replies of one turn to each prompt.

    Raises:
        TrainingError: there are images, and the sampler takes none.
    """
    if not any(images):
        return speaker.sample(prompts, keys, n, temperature)
    if not isinstance(speaker, SeeingSampler):
        raise TrainingError(TEXT_ALONE)
    return speaker.sample(prompts, keys, n, temperature, images)


def text_of(run: "Run", reply: Reply) -> str:
    """Return what rewards read of a reply: its text or, of several turns, that of the last one."""
    turns = [one for one in reply.messages if one["role"] == "assistant"]
    return str(turns[-1]["content"] if turns else run.tokenizer.decode(reply.ids, skip_special_tokens=True))


def batch_of(groups: list[Group], tokenizer: Any, *, packing: bool, mask_truncated: bool) -> Batch:
    """Return the micro-batch of some groups.

    Args:
        groups: with their advantages.
        tokenizer: of the run; None where tokens mean nothing, as in a plan.
        packing: whether documents lie side by side, and prompts are there only once; else each has a padded row.
        mask_truncated: whether nothing is learned from replies that were cut off.

    Returns:
        What `collate_groups` returns, with the count `replies`, the columns above, and what `with_facts` adds.
    """
    examples = [_example(group, mask_truncated) for group in groups]
    batch = laid(collate_groups, examples, tokenizer, packing=packing, columns=COLUMNS)
    return with_facts(batch.but(counted={"replies": len(batch["lengths"]), **batch.counted}), groups)


def laid(
    collate: Callable[..., Batch], examples: list[Example], tokenizer: Any, *, columns: Columns, packing: bool = True
) -> Batch:
    """Return the batch of examples whose documents begin with prompts, with the images of these.

    Args:
        collate: `collate_groups` or `collate_pairs`.
        examples: with their images, if the model sees any.
        tokenizer: of the run, or None.
        columns: what examples carry besides.
        packing: whether documents lie side by side.
    """
    processor = processor_of(tokenizer)
    columns = columns if processor is None else {**columns, IMAGES: Column("span", "json")}
    batch = collate([examples], pad_id=pad_id(tokenizer), packing=packing, columns=columns)
    return batch if processor is None else shown_to_policy(batch, processor)


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
    """Return the documents of a group: its prompt with each of its replies, in as many parts as these have."""
    documents, advantages, sampled = [], [], []
    for reply, advantage in zip(group.replies, group.advantages, strict=True):
        learned = reply.ended or not mask_truncated
        for part in reply.parts:
            prompt = group.prompt if part.prompt is None else part.prompt
            ids = np.array([*prompt, *part.ids], dtype=np.int64)
            documents.append((ids, np.array([False] * len(prompt) + part.drawn) & learned))
            advantages.append(np.full(len(ids), advantage))
            sampled.append(np.array([0.0] * len(prompt) + part.log_probs))
    images = (group.images,) * len(documents)
    return Example(tuple(documents), {"advantages": tuple(advantages), "sampled": tuple(sampled), IMAGES: images})


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
    found["reply/tokens"] = [[float(sum(sum(x.drawn) for x in one.parts)) for one in group.replies] for group in groups]
    if any(group.rounds is not None for group in groups):
        found["resampled"] = [[float(group.rounds or 0)] for group in groups]
    found["reply/cut_off"] = [[float(not one.ended) for one in group.replies] for group in groups]
    if any(one.messages for group in groups for one in group.replies):
        found["turns"] = [[float(one.turns) for one in group.replies] for group in groups]
        found["turns/anew"] = [[float(len(one.earlier)) for one in group.replies] for group in groups]
    return found


def means_of(groups: list[Group]) -> dict[str, Any]:
    """Return what an evaluation knows of replies: means over groups of the means of each."""
    found = facts_of(groups)
    sums = {name: sum(statistics.fmean(some) for some in values if some) for name, values in found.items()}
    return {name: Term(torch.tensor(total), "weight", 0.0) for name, total in sums.items() if name != "flat"}
