"""Tokenizer blocks."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from posttrain.blocks.models.model import HFModel
from posttrain.blocks.tokenizers.templates import NEEDED, template_text
from posttrain.errors import RecipeError
from posttrain.interfaces import ModelBlock
from posttrain.registry import block
from posttrain.values import Secret, missing_folder

log = logging.getLogger("posttrain")


@block("tokenizer", "hf")
class HFTokenizer:
    """A tokenizer of transformers, with its chat template."""

    name_or_path: str | None = None
    """A folder or a hub name; the model's by default."""
    chat_template: str | None = None
    """A Jinja template, a file that holds one, or the name of one that ships with posttrain (chatml, llama3,
    zephyr, plain); the tokenizer's own by default."""
    pad_token: str | None = None
    """A token of the vocabulary to pad with; the tokenizer's own by default, or else its end token."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer; as the model says, if it is the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub tokenizer; the model's, if it is the model's own."""
    token: Secret | None = None
    """For a private hub tokenizer: `${HF_TOKEN}`; the model's, if it is the model's own."""
    processor: dict[str, Any] = attrs.field(factory=dict)
    """Arguments of the processor of images, such as `max_pixels`, for a model that sees them."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield a path that leads nowhere."""
        if self.name_or_path and (problem := missing_folder(self.name_or_path)):
            yield "name_or_path", problem

    def build(self, model: ModelBlock) -> Any:
        """Return the tokenizer. What a recipe says of the model's origin holds for the model's own tokenizer too.

        Raises:
            RecipeError: it cannot be loaded, gives no offsets, or lacks the padding token or those of the template.
        """
        from transformers import AutoTokenizer

        name = self.name_or_path or model.name_or_path
        revision, token, trusted = self.revision, self.token, self.trust_remote_code
        if name == model.name_or_path and isinstance(model, HFModel):
            revision, token = revision or model.revision, token or model.token
            trusted = trusted or model.trust_remote_code
        secret = token.reveal() if token else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted, revision=revision, token=secret)
        except (OSError, ValueError, ImportError, KeyError) as error:
            there = Path(name).is_dir()
            where = "" if there else f" (there is no folder {name!r} here, so it was looked for on the hub)"
            raise RecipeError(f"tokenizer {name!r} cannot be loaded{where}: {error}") from error
        if not tokenizer.is_fast:
            raise RecipeError(
                f"tokenizer {name!r} is not a fast one: it cannot say which characters a token stands for"
            )
        if self.chat_template is not None:
            tokenizer.chat_template = template_text(self.chat_template)
            vocabulary = tokenizer.get_vocab()
            missing = [token for token in NEEDED.get(self.chat_template, ()) if token not in vocabulary]
            if missing:
                raise RecipeError(
                    f"tokenizer.chat_template: {self.chat_template} needs the tokens {', '.join(missing)}, "
                    f"which {name!r} does not have; zephyr and plain need none but its end token"
                )
        if self.pad_token is not None:
            if self.pad_token not in tokenizer.get_vocab():
                raise RecipeError(f"tokenizer.pad_token: {name!r} has no token {self.pad_token!r}")
            tokenizer.pad_token = self.pad_token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return self.with_images(tokenizer, name, model, {"revision": revision, "token": secret})

    def with_images(self, tokenizer: Any, name: str, model: ModelBlock, hub: dict[str, Any]) -> Any:
        """Return the tokenizer with the processor of images, if the model sees any.

        Raises:
            RecipeError: the processor cannot be loaded, or `processor` has keys that mean nothing.
        """
        from posttrain.blocks.images.loading import load
        from posttrain.blocks.images.processor import seeing

        config = images = None
        if isinstance(model, HFModel):
            with suppress(OSError, ValueError):  # what the model will say of it tells more
                config = model.read_config()
        if config is not None and config.get_text_config() is not config:
            try:
                images = load(name, tokenizer, config, hub, self.processor)
            except RecipeError as error:
                if self.processor:
                    raise
                log.warning("%s; it can be trained on text alone, and exports have no processor", error)
        if images is None and self.processor:
            raise RecipeError(f"tokenizer.processor: there is no processor of images beside {name!r}")
        return tokenizer if images is None else seeing(tokenizer, images)
