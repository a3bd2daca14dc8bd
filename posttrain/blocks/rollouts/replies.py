"""What passes between sampler, rewards and loss: replies as token ids, never tokenized again, and groups of them."""

import itertools
from typing import Any

import attrs


@attrs.frozen
class Reply:
    """What a policy said to a prompt, in one turn or, with an environment, in several."""

    ids: list[int]
    """Tokens, in the order in which they were drawn; the one that ended the reply is the last. Of several turns, what
    was said to the policy in between stands among them."""
    log_probs: list[float]
    """Of each, under the distribution that it was drawn from, in nats; 0 for those that the policy did not say."""
    ended: bool
    """Whether it came to its end; otherwise it was cut off at the most tokens or turns that it may have."""
    said: list[bool] | None = None
    """Which of the tokens the policy drew; None for all."""
    prompt: list[int] | None = None
    """What it goes on from, if that is not the prompt of its group."""
    earlier: "tuple[Reply, ...]" = ()
    """Turns of the same conversation before it was rendered again, since its tokens would have changed."""
    messages: list[dict[str, Any]] = attrs.field(factory=list)
    """Of several turns, all that was said behind the prompt, as a conversation."""
    reward: "float | Failure" = 0.0
    """What the environment gave for it."""

    def __attrs_post_init__(self) -> None:
        assert len(self.ids) == len(self.log_probs) == len(self.drawn)

    @property
    def drawn(self) -> list[bool]:
        """Whether the policy drew each token."""
        return [True] * len(self.ids) if self.said is None else self.said

    @property
    def turns(self) -> int:
        """How often the policy spoke: stretches of tokens that it drew."""
        each = [[False, *part.drawn] for part in self.parts]
        return sum(not before and now for drawn in each for before, now in itertools.pairwise(drawn))

    @property
    def parts(self) -> "tuple[Reply, ...]":
        """All of it, each with a prompt of its own."""
        return (*self.earlier, self)


@attrs.frozen
class Call:
    """A tool that a policy wants to be used."""

    name: str
    arguments: dict[str, Any]


@attrs.frozen
class Turn:
    """What a policy said in one turn, as an environment sees it."""

    text: str
    """Without special tokens."""
    calls: list[Call] = attrs.field(factory=list)
    """Tools that it calls, in the way of its chat template."""
    trouble: str = ""
    """Why a call could not be read."""


@attrs.frozen
class Outcome:
    """What an environment answers."""

    messages: list[dict[str, Any]] = attrs.field(factory=list)
    """What is said to the model next; the conversation ends where there are none."""
    reward: float = 0.0
    """What the turn was worth; those of a conversation are added up."""


@attrs.frozen
class Sample:
    """A reply as rewards see it."""

    prompt: str
    """The prompt as the model saw it, special tokens included."""
    text: str
    """The reply, without special tokens."""
    row: dict[str, Any]
    """The columns of the prompt's row."""
    messages: list[dict[str, Any]]
    """The prompt as a conversation; empty if it is plain text."""
    reply: Reply
    """With `messages`, all turns of a conversation with an environment; `text` is then the last one."""
    images: list[Any] = attrs.field(factory=list)
    """Of the prompt, as PIL images."""


@attrs.frozen
class Failure:
    """A reward that could not be told, and why. The reply is then not learned from."""

    reason: str


@attrs.define
class Group:
    """A prompt and the replies to it, with what became known of them."""

    place: int
    """Which prompt of the step it is, over all ranks."""
    prompt: list[int]
    row: dict[str, Any]
    messages: list[dict[str, Any]]
    replies: list[Reply]
    conversation: dict[str, Any] = attrs.field(factory=dict)
    """What its prompt was rendered with besides the messages, such as tools."""
    images: list[dict[str, Any]] = attrs.field(factory=list)
    """Of its prompt: where each stands among the tokens, what it is, and the `picture` itself."""
    samples: list[Sample] = attrs.field(factory=list)
    parts: dict[str, list[float | Failure]] = attrs.field(factory=dict)
    """What each reward said of each reply."""
    rewards: list[float | None] = attrs.field(factory=list)
    """The weighted sum for each reply; None if a part of it failed."""
    advantages: list[float] = attrs.field(factory=list)
    rounds: int | None = None
    """How often its replies were sampled again, since all were worth the same; None where that is not done."""

    @property
    def identity(self) -> bytes:
        """What tells its prompt from others, images included."""
        import numpy as np

        return np.array(self.prompt).tobytes() + "".join(image["hash"] for image in self.images).encode()

    @property
    def flat(self) -> bool:
        """Whether its replies are worth the same, so that there is nothing to choose between."""
        return len(set(self.rewards) - {None}) < 2
