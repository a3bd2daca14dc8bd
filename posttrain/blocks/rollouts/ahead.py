"""Replies to the prompts of the next step, while this one is learned from: the sampler runs one step ahead.

Before a step's updates the sampler is brought the weights as they are, and asked for the replies of the step after it.
So these are of the policy one step before, always, and the loss must weigh them by `correction`; the first step of a
process, which nothing was asked for ahead of, has replies of its own policy. Sources: asynchronous RLHF
(arXiv:2410.18252), AReaL (arXiv:2505.24298).
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.batch import Batch
from posttrain.blocks.rollouts.groups import Answer, asked
from posttrain.blocks.rollouts.replies import Group, Reply
from posttrain.interfaces import AheadSampler, Position

if TYPE_CHECKING:
    from posttrain.run import Run

Fetch = tuple[list[Batch], Position]
T = TypeVar("T")


class Ahead:
    """Answers prompts as another function does, and those of the next step before they are asked."""

    def __init__(self, run: "Run", speaker: AheadSampler, answer: Answer, seed: int) -> None:
        self.run, self.speaker, self.answer, self.seed = run, speaker, answer, seed
        self.next: list[Batch] = []
        self.pending: tuple[Any, Future[list[list[Reply]]]] | None = None

    def groups(self, fetched: Iterator[Fetch]) -> Iterator[Fetch]:
        """Yield what is fetched for each step, knowing already what the next one gets."""
        current = next(fetched)
        while True:
            following = next(fetched)
            self.next = following[0]
            yield current
            current = following

    def begin(self, n: int) -> None:
        """Ask for n replies to each prompt of the next step. All ranks call it, before the updates of this one."""
        step = self.run.step + 1
        if step >= self.run.max_steps:
            return
        groups = [group for some in asked(self.run, self.next) for group in some]
        keys: list[tuple[int, ...]] = [(self.seed, step, group.place) for group in groups]
        self.speaker.hold(groups[0].prompt if groups else [0])
        found = in_background(lambda: self.answer(groups, keys, n, None))
        self.pending = asked_for(groups, keys, n), found

    def __call__(
        self, groups: list[Group], keys: list[tuple[int, ...]], n: int, temperature: float | None
    ) -> list[list[Reply]]:
        """Return n replies to each prompt: those that were asked for before, or new ones. All ranks call it."""
        if self.pending is not None:
            what, found = self.pending
            begin = time.perf_counter()
            replies = found.result()  # anything else must wait for it, too: the weights are still held
            self.speaker.release()
            if temperature is None and what == asked_for(groups, keys, n):
                self.pending = None
                self.run.log(**{"sampler/waited": time.perf_counter() - begin})
                return replies
        return self.answer(groups, keys, n, temperature)


def asked_for(groups: list[Group], keys: list[tuple[int, ...]], n: int) -> Any:
    """Return what replies depend on, besides the weights."""
    return [(group.prompt, group.row) for group in groups], keys, n


def in_background(function: Callable[[], T]) -> "Future[T]":
    """Run a function in a thread of its own, which, unlike one of a pool, does not keep the process alive."""
    found: Future[T] = Future()

    def work() -> None:
        try:
            found.set_result(function())
        except BaseException as error:  # it is raised where the result is asked for
            found.set_exception(error)

    threading.Thread(target=work, name="posttrain-sampler", daemon=True).start()
    return found
