"""How far apart two models are: what each says next on the same texts."""

import logging
import random
from itertools import islice
from pathlib import Path
from typing import Any

import attrs

from posttrain.errors import PosttrainError

log = logging.getLogger("posttrain")
LONGEST = 128
"""Tokens of a text that are compared: what is said next takes a number for each token of the vocabulary."""


@attrs.frozen
class Distance:
    """Between two models, in nats."""

    difference: float
    """Largest difference of a log-probability of a token that is there."""
    kl: float
    """Mean divergence KL(first | second) of the next token."""


def distance(first: list[Any], second: list[Any], rows: list[list[int]]) -> Distance:
    """Return how far two models are apart.

    Args:
        first: log-probabilities of one model for each text, float32 [n - 1, vocabulary], of `log_probs`.
        second: of the other.
        rows: the tokens of the texts.
    """
    import torch

    pairs = list(zip(first, second, rows, strict=True))
    furthest = max(float((a - b).gather(1, torch.tensor(ids)[1:, None]).abs().max()) for a, b, ids in pairs)
    return Distance(furthest, float(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b, _ in pairs]).mean()))


def log_probs(hf: Any, rows: list[list[int]]) -> list[Any]:
    """Return the log-probabilities of all tokens behind each of a text but the last, float32 [n - 1, vocabulary]."""
    import torch

    with torch.no_grad():
        return [hf(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in rows]


def texts_of(name: str, tokenizer: Any, count: int = 8) -> list[list[int]]:
    """Return tokens to compare models on: the first rows of a run's data (held-out ones if it has a file of such), or
    where there are none, tokens drawn at random."""
    from posttrain.recipes.load import load

    recipe, draw = Path(name) / "recipe.yaml", random.Random(0)
    drawn = [[draw.randrange(len(tokenizer)) for _ in range(64)] for _ in range(count)]
    if not recipe.is_file():
        return drawn
    try:
        data: Any = load(recipe).data
        held = attrs.evolve(data, sources=data.eval_sources) if getattr(data, "eval_sources", []) else data
        shown = islice(held.preview(tokenizer, count), count)
        texts = ["".join(text for text, _, _ in each.tokens) for each in shown]
    except PosttrainError as error:  # moved, or asked for from another folder
        log.warning("compared on tokens drawn at random, since the rows of %s cannot be read here: %s", name, error)
        return drawn
    found = [tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST] for text in texts]
    return [ids for ids in found if len(ids) > 1]
