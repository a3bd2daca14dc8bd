"""The parts of a model of images and text: the tower that sees, the projector behind it, and the language model.

Which of them are trained is one key of a recipe, `model.train`.
"""

from typing import Any, Literal, TypeAlias

import attrs
from torch import nn

from posttrain.blocks.models.documents.ways import decoder_of, head_of
from posttrain.errors import RecipeError

Part: TypeAlias = Literal["language", "projector", "tower"]


@attrs.frozen
class Parts:
    """Where the parts of a model are: what the names of their parameters begin with."""

    language: tuple[str, ...]
    tower: str | None
    """None if it cannot be told from the projector."""

    def of(self, name: str) -> Part:
        """Return the part that a parameter belongs to."""
        if name.startswith(self.language):
            return "language"
        inside = self.tower is not None and name.startswith(self.tower) and "merger" not in name
        return "tower" if inside else "projector"  # Qwen's projectors are mergers inside of the tower


@attrs.frozen
class Sight:
    """How images enter a network."""

    blocks: bool
    """Whether the tokens of an image see all of it, and not only what lies before them."""
    language: tuple[str, ...]
    """What the names of the language model's parameters begin with."""


def parts_of(hf: Any) -> Parts | None:
    """Return the parts of a model of images and text; None if it knows only text."""
    if hf.config.get_text_config() is hf.config:
        return None
    decoder = decoder_of(hf)
    decoder = getattr(decoder, "language_model", None) or decoder  # some have the image parts and the language in it
    named = (name_of(hf, part) for part in (decoder, output_of(hf)) if part is not None)
    language = tuple(f"{name}." if name else "" for name in named)  # all of it is, if nothing else makes hidden states
    encoder = hf.get_encoder(modality="image")
    seen = encoder is not None and encoder is not hf and encoder is not hf.base_model  # Gemma 4 may have no tower
    return Parts(language, f"{name_of(hf, encoder)}." if seen else None)


def output_of(hf: Any) -> nn.Module | None:
    """Return what makes logits, or the score of a reward model."""
    head: nn.Module | None = head_of(hf)
    return hf._modules.get("score") if head is None else head


def name_of(hf: nn.Module, module: nn.Module) -> str:
    """Return what a model calls one of its modules."""
    return next(str(name) for name, found in hf.named_modules() if found is module)


def freeze_parts(hf: Any, train: list[Part], blind: str | None) -> None:
    """Train only some parts of a model of images and text; one of text has but one.

    Args:
        hf: of transformers.
        train: the parts.
        blind: why the model cannot be trained on images, if so: then it is its language model alone.

    Raises:
        RecipeError: the model has no such parts.
    """
    parts = parts_of(hf)
    if parts is not None and blind is not None:
        if "language" not in train:
            raise RecipeError(f"model.train: only the language model can be trained: {blind}")
        train = ["language"]
    if parts is None:
        if "language" not in train:
            kind = hf.config.model_type
            raise RecipeError(f"model.train: {kind!r} is a model of text alone, so language must be in it")
        return
    if parts.tower is None and ("tower" in train) != ("projector" in train):
        kind = type(hf).__name__
        raise RecipeError(f"model.train: in {kind} the tower cannot be told from the projector: name both or none")
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(parts.of(name) in train)


def linears(hf: Any, train: list[Part]) -> list[str]:
    """Return the names of the linear layers in some parts of a model, but for its head."""
    parts, head = parts_of(hf), output_of(hf)
    return [
        name
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and module is not head and (parts is None or parts.of(f"{name}.") in train)
    ]
