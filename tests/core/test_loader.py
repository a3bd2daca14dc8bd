"""Rows and micro-batches: nothing lost, nothing twice, the same order for any number of ranks."""

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import InMemory, Numbers, document

from posttrain.blocks.data.loader import MapLoader, StreamLoader, ahead
from posttrain.blocks.data.packing import best_fit, plan
from posttrain.blocks.layout import Example, lay


def loader(
    kind: str, rank: int = 0, world: int = 1, micro: int = 2, seed: int = 7, packing: bool = True, **more: Any
) -> Any:
    shape = {"max_length": 64, "packing": packing, "micro_batch_size": micro, "rank": rank, "world_size": world,
             "seed": seed}  # fmt: skip
    if kind == "map":
        return MapLoader(examples=more.get("documents") or InMemory(range(50)), **shape)
    return StreamLoader(
        stream=Numbers(50), encode=lambda rows, _: [Example((document(row),)) for row, _ in rows], window=20, **shape
    )  # fmt: skip


def rows_of(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    return [tuple(row[row != 0]) for row in batch["input_ids"].numpy()]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(60, 100))
@settings(deadline=None, max_examples=200)
def test_packing_loses_nothing_and_overfills_nothing(lengths: list[int], capacity: int) -> None:
    bins = best_fit(np.array(lengths), capacity)
    assert sorted(i for found in bins for i in found) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in found) <= capacity for found in bins)
    spaces = [capacity - sum(lengths[i] for i in found) for found in bins]
    smallest = [min(lengths[i] for i in found) for found in bins]
    for early, late in pairwise(range(len(bins))):  # the smallest item of a later bin had no room in an earlier one
        assert spaces[early] < max(lengths[i] for i in bins[late]) or smallest[early] <= spaces[early] + smallest[early]


def test_packing_fills_rows_to_more_than_99_percent() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 0.8, 20_000), 16, 2048).astype(np.int64)
    rows = plan(random.permutation(len(lengths)), lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.99


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("packing", [True, False])
def test_every_document_is_seen_once_per_pass(kind: str, packing: bool) -> None:
    found = [row for batch in loader(kind, packing=packing).one_pass() for row in rows_of(batch)]
    tokens = sorted(t for row in found for t in row)
    assert tokens == sorted(t for seed in range(50) for t in document(seed)[0].tolist())


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_order_of_one_rank(kind: str, world: int) -> None:
    alone = loader(kind, micro=2 * world)
    ranks = [loader(kind, rank=rank, world=world) for rank in range(world)]
    streams = [each.batches(each.start()) for each in ranks]
    for whole, position in islice(alone.batches(alone.start()), 12):
        parts = [next(stream) for stream in streams]
        assert rows_of(whole) == [row for batch, _ in parts for row in rows_of(batch)]
        assert all(where == position for _, where in parts)


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("packing", [True, False])
def test_reading_goes_on_from_any_position(kind: str, packing: bool) -> None:
    made = loader(kind, packing=packing)
    whole = [(rows_of(batch), position) for batch, position in islice(made.batches(made.start()), 40)]
    for cut in range(0, 30, 7):
        again = loader(kind, packing=packing)
        rest = [rows_of(batch) for batch, _ in islice(again.batches(whole[cut][1]), 5)]
        assert rest == [rows for rows, _ in whole[cut + 1 : cut + 6]]


def test_the_order_differs_by_pass_and_by_seed() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return loader("map", seed=seed).plan(epoch)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_weights_repeat_and_sample_sources() -> None:
    documents = InMemory(range(40), weights=(1.0, 2.5))
    made = loader("map", documents=documents, packing=False)
    counts = np.bincount([i for row in made.plan(0) for i in row], minlength=40)
    assert set(counts[::2]) == {1}
    assert sorted(counts[1::2].tolist()) == [2] * 10 + [3] * 10
    assert made.plan(0) != made.plan(1)


def test_evaluation_gives_every_rank_as_many_batches_and_counts_each_row_once() -> None:
    documents = InMemory(range(7))
    whole = sum(batch["weight"] for batch in loader("map", documents=documents, packing=False).one_pass())
    parts = [list(loader("map", rank, 3, 1, documents=documents, packing=False).one_pass()) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert sum(batch["weight"] for part in parts for batch in part) == whole


def test_a_batch_says_where_documents_begin_and_what_predicts_what() -> None:
    first, second = (np.array([5, 6, 7]), np.array([True, False, True])), (np.array([8, 9]), np.array([True, True]))
    batch = lay([[first, second], [second]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9], [-100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["seqlens"].tolist() == [3, 2, 2, 3]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 7, 10]
    assert batch["supervised"].tolist() == [1, 3, 5]
    assert batch["targets"].tolist() == [7, 9, 9]
    assert (batch["weight"], batch["tokens"], batch["max_seqlen"]) == (3, 7, 3)


def test_an_error_while_reading_ahead_reaches_the_reader() -> None:
    def broken() -> Any:
        yield 1
        raise OSError("the disk is gone")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
