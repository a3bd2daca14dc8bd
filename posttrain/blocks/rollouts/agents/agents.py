"""Lets agents play side by side, and answers all that are waiting for the policy together.

The policy speaks when every agent under way waits for it or is done. So what is sampled together does not depend on how
fast agents are; and what is said to a request is a function of the weights, the rollout's key and the conversation.
"""

import asyncio
import inspect
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from posttrain.blocks.rollouts.agents.conversation import Language, Request, Rollout
from posttrain.blocks.rollouts.agents.endpoint import Endpoint, Refusal
from posttrain.blocks.rollouts.ahead import in_background
from posttrain.blocks.rollouts.replies import Failure, Group, Reply
from posttrain.blocks.rollouts.rewards import number
from posttrain.blocks.rollouts.turns.conversations import anywhere
from posttrain.interfaces import AgentBlock, Sampler

if TYPE_CHECKING:
    from posttrain.run import Run

DECIDED = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "frequency_penalty", "presence_penalty",
)  # fmt: skip
"""What a request may say, and the recipe's sampler decides."""
LOOK = 1.0
"""Seconds between looks whether an agent takes too long."""
log = logging.getLogger("posttrain")


class Agents:
    """Lets the agents of an environment play with the policy of a run."""

    def __init__(self, run: "Run", speaker: Sampler, environment: AgentBlock, template_args: dict[str, Any]) -> None:
        self.run, self.speaker, self.environment = run, speaker, environment
        self.language = Language(run, template_args)
        self.playing: dict[str, Playing] = {}
        self.changed = threading.Condition()
        self.ignored = set[str]()

    def answers(
        self, groups: list[Group], keys: list[tuple[int, ...]], n: int, temperature: float | None
    ) -> list[list[Reply]]:
        """Return n episodes for each prompt."""
        limits = self.environment.max_turns, self.environment.max_tokens
        rollouts = [
            [Rollout(self.language, group, (*key, i), *limits) for i in range(n)]
            for group, key in zip(groups, keys, strict=True)
        ]
        waiting = deque(one for some in rollouts for one in some)
        with Endpoint(self.ask) as endpoint:
            try:
                while anywhere(self.run, self.speaker, bool(waiting or self.playing)):
                    asked = self.asked(waiting, endpoint)
                    prompts, each = [request.context for _, request in asked], [request.key for _, request in asked]
                    said = self.speaker.sample(prompts, each, 1, temperature)
                    for (one, request), (reply,) in zip(asked, said, strict=True):
                        one.hear(request, reply)
            finally:
                for one in self.playing.values():  # only where the sampler failed
                    one.give_up(Failure("the run has ended"))
                self.playing = {}
        return [[rollout.reply() for rollout in some] for some in rollouts]

    def asked(self, waiting: deque[Rollout], endpoint: Endpoint) -> list[tuple["Playing", Request]]:
        """Return what the agents under way ask, once each of them waits; others are started as some are done."""
        with self.changed:
            while True:
                self.playing = {name: one for name, one in self.playing.items() if not one.over}
                while waiting and len(self.playing) < self.environment.concurrency:
                    self.start(waiting.popleft(), endpoint)
                if not (busy := [one for one in self.playing.values() if not one.requests]):
                    return [(one, request) for one in self.playing.values() for request in one.placed()]
                for one in busy:
                    one.look(self.environment.timeout)
                self.changed.wait(LOOK)
                self.run.watchdog.beat()

    def start(self, rollout: Rollout, endpoint: Endpoint) -> None:
        """Let an agent play in a thread of its own."""
        name, play = uuid.uuid4().hex, self.environment.reset(rollout.group.row)
        self.playing[name] = one = Playing(rollout)

        def ended(task: Future[Any]) -> None:
            with self.changed:
                one.end(task, self.environment.weight)
                self.changed.notify_all()

        in_background(lambda: played(play, endpoint.address(name))).add_done_callback(ended)

    def ask(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request of an agent; called in a thread of the endpoint.

        Raises:
            Refusal: it is not answered.
        """
        if more := {one for one in DECIDED if body.get(one) is not None} - self.ignored:
            self.ignored |= more
            log.info("agents say %s: in training the recipe's sampler decides that", ", ".join(sorted(more)))
        request = Request(body)
        with self.changed:
            one = self.playing.get(name)
            if one is None or one.over:
                raise Refusal("this rollout is over", "gone", 410)
            one.requests.append(request)
            self.changed.notify_all()
        return request.answer.result()


def played(play: Callable[[str], Any], base_url: str) -> Any:
    """Let an agent play to its end, and return its reward."""
    found = play(base_url)
    if inspect.isawaitable(found):

        async def waited() -> Any:
            return await found

        return asyncio.run(waited())
    return found


def reward_of(result: Any) -> float | Failure:
    """Return the reward that an agent gives, or why it is none."""
    return number(result) if result is not None else Failure("it returned no reward (weight: 0 is for agents without)")


class Playing:
    """An agent at work."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout, self.requests, self.given = rollout, list[Request](), list[Request]()
        self.since, self.over = time.monotonic(), False

    def placed(self) -> list[Request]:
        """Return what it asks and the policy is to answer."""
        requests, self.requests, self.since = self.requests, [], time.monotonic()
        self.given = list(self.rollout.placed(requests))
        return self.given

    def hear(self, request: Request, reply: Reply) -> None:
        """Tell it what the policy says."""
        self.since = time.monotonic()
        self.rollout.hear(request, reply)

    def look(self, timeout: float | None) -> None:
        """Give it up if it has asked nothing for too long."""
        if timeout is not None and time.monotonic() - self.since > timeout:
            self.give_up(Failure(f"it asked nothing for {timeout:g} s"))

    def end(self, task: Future[Any], weight: float) -> None:
        """Take its reward."""
        if self.over:
            return
        error = task.exception()
        if error is None:
            self.rollout.reward = reward_of(task.result()) if weight else 0.0
        elif not self.rollout.cut_off:  # else it has failed since it was refused, and earns nothing
            self.rollout.reward = Failure(f"{type(error).__name__}: {error}")
        self.close()

    def give_up(self, failure: Failure) -> None:
        """Let it alone; what it asks from now on is refused."""
        self.rollout.reward = failure
        self.close()

    def close(self) -> None:
        """Refuse what it still asks, and what the policy has not answered."""
        self.over = True
        for request in (*self.requests, *self.given):
            with suppress(InvalidStateError):  # it was answered
                request.answer.set_exception(Refusal("this rollout is over", "gone", 410))
