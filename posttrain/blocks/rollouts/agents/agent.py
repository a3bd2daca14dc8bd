"""A function of your own that plays an episode: it asks the policy as often as it likes, and returns a reward."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import attrs
from attrs.validators import gt, optional

from posttrain.registry import block, key, members

F = TypeVar("F", bound=Callable[..., Any])


@attrs.frozen(kw_only=True, slots=False)
class Agent:
    """What agents share. A subclass with `play` is an environment of its own (`@block("environment", "name")`)."""

    specs: ClassVar[list[dict[str, Any]]] = []
    """Agents send their tools along when they ask."""

    weight: float = 1.0
    """What the reward that it returns is multiplied by in the sum of all. 0 for an agent that returns none."""
    max_turns: int = key(16, check=gt(0))
    """How often a rollout may ask; after that it is refused, and counts as cut off."""
    max_tokens: int = key(4096, check=gt(0))
    """Tokens that a conversation may have when the policy is asked to go on with it; a longer one is refused, and its
    rollout counts as cut off."""
    concurrency: int = key(64, check=gt(0))
    """Rollouts that run at a time, on each rank."""
    timeout: float | None = key(300.0, check=optional(gt(0)))
    """Seconds that a rollout may take between two requests, before it counts as failed; null for as long as it likes.
    """

    def play(self, row: dict[str, Any], base_url: str) -> Any:
        """Play an episode, and return its reward; may be a coroutine.

        Args:
            row: the columns of the prompt's row.
            base_url: where the policy can be asked, by the API of OpenAI's chat completions.
        """
        raise NotImplementedError

    def reset(self, row: dict[str, Any]) -> Callable[[str], Any]:
        """Return what plays an episode for a row, given the address of the policy."""
        return partial(self.play, row)


def agent(name: str) -> Callable[[F], F]:
    """Make a function an environment that recipes can use: `environment: {type: name}`.

    It is called with the columns of a prompt's row and the address of the policy, which speaks OpenAI's API of chat
    completions, and returns a reward. It may be a coroutine. Its keyword arguments become keys of the recipe.

    Raises:
        RegistryError: the name is taken by another function.

    >>> @agent("doctest-asks-once")
    ... async def asks_once(row, base_url, *, hint: str = ""):
    ...     client = openai.AsyncOpenAI(base_url=base_url, api_key="none")
    ...     messages = [{"role": "user", "content": row["question"] + hint}]
    ...     answer = await client.chat.completions.create(model="policy", messages=messages)
    ...     return answer.choices[0].message.content == row["answer"]
    >>> lookup("environment", "doctest-asks-once")(hint=" Be brief.").max_turns
    16
    """

    def register(function: F) -> F:
        found = members(function)
        names = list(found["__annotations__"])

        def play(self: Agent, row: dict[str, Any], base_url: str) -> Any:
            return function(row, base_url, **{name: getattr(self, name) for name in names})

        made = type(function.__name__, (Agent,), {**found, "play": play})
        block("environment", name)(made)
        return function

    return register
