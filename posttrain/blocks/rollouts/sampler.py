"""Sampling from the network in training: exact, on any device, under any strategy."""

from typing import TYPE_CHECKING

import attrs
from attrs.validators import gt

from posttrain.interfaces import Sampler
from posttrain.registry import block, key

if TYPE_CHECKING:
    from posttrain.run import Run


@block("sampler", "transformers")
class TransformersSampler:
    """The network in training says the replies itself, in this process: nothing has to be kept in step.

    A prompt is read once for all replies to it. The draws of a reply are a function of its key alone, so that it does
    not depend on what is sampled beside it, on the cut of the step, on the rank, or on where a run went on.
    """

    max_new_tokens: int = key(256, check=gt(0), also=("max_completion_length",))
    """The most tokens that a reply may have; one that reaches it is cut off, and counted."""
    temperature: float = key(1.0, check=gt(0))
    """What logits are divided by, in sampling as in the loss."""
    stop: list[str] = attrs.field(factory=list)
    """A reply also ends with the token that completes one of these texts."""
    rows: int = key(256, check=gt(0))
    """Replies that grow side by side; more take more memory."""

    def build(self, run: "Run") -> Sampler:
        """Return the sampler."""
        from posttrain.blocks.rollouts.in_process import InProcess

        return InProcess(run, self.max_new_tokens, self.temperature, self.stop, self.rows)
