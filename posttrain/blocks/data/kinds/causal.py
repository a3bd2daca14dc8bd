"""Plain text, as in pretraining."""

from typing import Any, Literal

from posttrain.blocks.data.data import Data
from posttrain.blocks.data.encoding.encoders import Encoder, TextEncoder
from posttrain.errors import DataError
from posttrain.registry import block


@block("data", "causal")
class CausalData(Data):
    """Plain text, every token of which is trained, as in pretraining."""

    overflow: Literal["error", "drop", "truncate", "split"] = "split"
    """What happens to a document that is longer than `max_length`."""
    text_column: str = "text"
    """The column that holds the text."""
    bos: bool = False
    """Put the tokenizer's begin token in front of each document."""
    eos: bool = True
    """Put the tokenizer's end token behind each document."""

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what tokenizes documents.

        Raises:
            DataError: the tokenizer has no such token.
        """
        for wanted, token in ((self.bos, "bos_token"), (self.eos, "eos_token")):
            if wanted and getattr(tokenizer, token) is None:
                raise DataError(f"the tokenizer has no {token}; set data.{token[:3]} to false")
        return TextEncoder(tokenizer, self.text_column, self.bos, self.eos, columns=self.columns)
