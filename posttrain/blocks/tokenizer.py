"""Tokenizer blocks."""

from typing import Any

from posttrain.interfaces import ModelBlock
from posttrain.registry import block


@block("tokenizer", "hf")
class HFTokenizer:
    """A tokenizer of transformers, with its chat template."""

    name_or_path: str | None = None
    """A folder or a hub name; the model's by default."""
    chat_template: str | None = None
    """A Jinja template, a file that holds one, or the name of one that ships with posttrain."""

    def build(self, model: ModelBlock) -> Any:
        """Load it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.name_or_path or model.name_or_path)
