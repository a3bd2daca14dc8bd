"""What passes between sampler, rewards and loss: replies as token ids, never tokenized again, and groups of them."""

from typing import Any

import attrs


@attrs.frozen
class Reply:
    """What a policy said to a prompt."""

    ids: list[int]
    """Tokens, in the order in which they were drawn; the one that ended the reply is the last."""
    log_probs: list[float]
    """Of each, under the distribution that it was drawn from, in nats."""
    ended: bool
    """Whether the policy ended it; otherwise it was cut off at the most tokens that a reply may have."""

    def __attrs_post_init__(self) -> None:
        assert len(self.ids) == len(self.log_probs)


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
    samples: list[Sample] = attrs.field(factory=list)
    parts: dict[str, list[float | Failure]] = attrs.field(factory=dict)
    """What each reward said of each reply."""
    rewards: list[float | None] = attrs.field(factory=list)
    """The weighted sum for each reply; None if a part of it failed."""
    advantages: list[float] = attrs.field(factory=list)

    @property
    def flat(self) -> bool:
        """Whether its replies are worth the same, so that there is nothing to choose between."""
        return len(set(self.rewards) - {None}) < 2
