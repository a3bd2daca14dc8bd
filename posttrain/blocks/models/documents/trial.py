"""What trying a tiny network needs: the same random numbers each time, and when two results count as the same."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

CLOSE = 1e-4
"""Of the largest number: float32 in another order differs less, a leak more."""
STEEP = 1e-3
"""Of the whole gradient: some recurrences are badly conditioned in float32."""
WINDOW = 8
"""The longest attention window of a tiny network: shorter than its documents, or a window would never show."""
LEAKS = "each document gets other numbers than alone"
GRADIENTS = "its gradients are not those of each document alone"


@attrs.frozen(eq=False)
class Held:
    """A configuration that a cache takes along but does not compare: its text beside it is what is compared."""

    config: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held)

    def __hash__(self) -> int:
        return 0


@contextmanager
def on_the_side() -> Iterator[None]:
    """Build and compute on the CPU, without gradients, and leave random numbers and libraries as they were."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        with (
            torch.device("cpu"),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
        ):
            torch.manual_seed(0)
            yield
    finally:
        theirs.set_verbosity(level)


def auto_of(config: Any) -> Any:
    """Return the class of transformers that loads a language model, or one of images and text."""
    import transformers

    causal, both = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    return both if type(config) in both._model_mapping else causal


def set_attention(hf: Any, attention: str) -> None:
    """Let the language model use an attention; what sees images keeps its own."""
    text_config = hf.config.get_text_config()
    text = next((name for name in hf.config.sub_configs if getattr(hf.config, name) is text_config), None)
    hf.set_attn_implementation(attention if text is None else {text: attention})


def log_probs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probability of each token of a document but the first, float32 [tokens - 1].

    Args:
        logits: [tokens, vocabulary].
        ids: int64 [tokens].
    """
    return logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors hold the same numbers, but for the order of sums."""
    return bool((found - expected).abs().max() <= CLOSE * max(1.0, float(expected.abs().max())))


def gradients_of(hf: Any, total: Tensor) -> list[Tensor | None]:
    """Return the gradient of a number by each parameter that is trained; a bias that experts are chosen by is not."""
    trained = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(total, trained, allow_unused=True))


def gradients_differ(ours: list[Tensor | None], each: list[list[Tensor | None]]) -> bool:
    """Whether a gradient differs from the sum of some others."""
    differ = whole = 0.0
    for one, *others in zip(ours, *each, strict=True):
        theirs = sum((x for x in others if x is not None), start=torch.zeros(()))
        differ += float(((0.0 if one is None else one) - theirs).square().sum())
        whole += float(theirs.square().sum())
    if not math.isfinite(whole):  # transformers' own is not a number: nothing can be said
        return False
    return not differ <= STEEP**2 * whole  # also if ours is not a number
