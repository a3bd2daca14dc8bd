"""What takes the place of a recipe's own on its twin: rewards, replies, an optimizer, and rows in another folder."""

import zlib
from pathlib import Path
from typing import Any

import attrs

from posttrain.blocks.data.sources import Told
from posttrain.blocks.images.pixels import LONGEST_NAME, image_as_text
from posttrain.blocks.rollouts.sampler import TransformersSampler
from posttrain.trainer import Trainer
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.trainers.on_policy_distill import OnPolicyDistillTrainer
from posttrain.trainers.online_dpo import OnlineDPOTrainer

Sampling = GRPOTrainer | OnlineDPOTrainer | OnPolicyDistillTrainer
"""Methods in which the model says replies."""
REPLY = 12
"""Tokens of a reply that the twin samples, at most."""
IMAGE_KEYS = ("images", "image", "path", "url", "image_url")
"""Under which rows name files of images."""


@attrs.frozen
class Noise:
    """A number in [0, 1) that depends on every letter of a reply: random weights earn nothing else, or all the same."""

    weight: float = 1.0
    name: str = "noise"

    def build(self, run: Any) -> Any:
        """Return what scores replies."""
        return lambda samples: [zlib.crc32(sample.text.encode()) / 2**32 for sample in samples]


@attrs.frozen
class UnitDescent:
    """Gradient descent with a rate of 1: what a parameter loses in a step is its gradient."""

    def build(self, model: Any) -> Any:
        """Return the optimizer."""
        import torch

        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def short_replies(real: Trainer) -> dict[str, Any]:
    """Return what a method that samples is changed by: a few short replies in this process, whose rewards differ."""
    changes: dict[str, Any] = {}
    if isinstance(real, Sampling):
        tokens = min(REPLY, real.sampler.max_new_tokens)
        changes["sampler"] = TransformersSampler(max_new_tokens=tokens, temperature=real.sampler.temperature)
    if isinstance(real, GRPOTrainer | OnlineDPOTrainer):
        changes |= {"group_size": min(4, real.group_size), "rewards": [*real.rewards, Noise()]}
    return changes | ({"mask_truncated": False, "max_staleness": 0} if isinstance(real, GRPOTrainer) else {})


def elsewhere(values: dict[str, Any]) -> dict[str, Any]:
    """Return a row that can be read from another folder: paths of images that begin beside its file are absolute."""
    root = values.origin.source.folder.absolute() if isinstance(values, Told) else Path()

    def moved(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: moved(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [moved(item, key) for item in value]
        named = key in IMAGE_KEYS and isinstance(value, str) and len(value) <= LONGEST_NAME
        return str(root / value) if named and (root / value).is_file() else value

    return {name: moved(value, name) for name, value in values.items()}


def as_text(value: Any) -> str:
    """Return what JSON cannot hold as text."""
    try:
        return image_as_text(value)
    except TypeError:
        return str(value)
