"""Pairs of conversations, one better than the other."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal

from attrs.validators import gt

from posttrain.batch import Batch
from posttrain.blocks.data.data import Data, anchor_of, pad_id
from posttrain.blocks.data.encoding.encoders import ChatEncoder, Encoder
from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.pairs import CHOSEN, REJECTED, pair, pair_schema
from posttrain.blocks.data.rows.schemas import Sample
from posttrain.blocks.layout import Column, Columns, Example, collate_pairs
from posttrain.registry import block, key


@block("data", "preference")
class PreferenceData(Data):
    """Pairs of conversations that answer the same messages, one better than the other.

    The two sides of a pair stay together. `max_length` is that of a side; a packed row holds twice as many
    tokens. Rows whose sides are equal or empty are refused or dropped as `invalid` says.
    """

    policies: ClassVar[tuple[str, ...]] = ("drop", "truncate")
    takes_images: ClassVar[bool] = True

    max_length: int = key(2048, check=gt(1))
    """Tokens that each side may have; a packed row holds twice as many."""
    overflow: Literal["error", "drop", "truncate"] = "error"
    """What happens to a pair with a side that is longer: say so and stop, leave the pair out, or keep the beginning of
    its sides."""
    template_args: dict[str, Any] = key(factory=dict, also=("chat_template_kwargs",))
    """More variables for the chat template (`enable_thinking`)."""

    @property
    def row_length(self) -> int:
        """Tokens in a packed row: at least one pair fits."""
        return 2 * self.max_length

    @property
    def columns(self) -> Columns:
        """What examples carry: also by how much the chosen side is better."""
        return {**super().columns, "margins": Column("example")}

    def collator(self, tokenizer: Any) -> Callable[[list[list[Example]], int], Batch]:
        """Return what makes a batch of rows of pairs."""
        columns = self.columns_of(tokenizer)
        lay = partial(collate_pairs, pad_id=pad_id(tokenizer), packing=self.packing, columns=columns)
        return self.with_images(lay, tokenizer)

    def fullest(self, length: int) -> Example:
        """Return a pair as large as can be."""
        ids, mask = super().fullest(length).documents[0]
        return Example(((ids, mask), (ids[::-1].copy(), mask)), dict.fromkeys(self.keep) | {"margins": 0.0})

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what renders and tokenizes both sides."""
        renderer = ChatRenderer(tokenizer, template_args=self.template_args, anchor=anchor_of(tokenizer))
        ours = type(self).pair is PreferenceData.pair
        return ChatEncoder(
            renderer, self.pair, pair_schema if ours else None, (CHOSEN, REJECTED), self.columns_of(tokenizer),
            sight=self.sight(tokenizer),
        )  # fmt: skip

    def sample(self, row: dict[str, Any]) -> Sample:
        """Return what a row says: both conversations."""
        return self.pair(row)

    def pair(self, row: dict[str, Any]) -> Sample:
        """Return a row's chosen and rejected conversation; override it for a schema of your own (see pairs.py)."""
        return pair(row)


def unfit(data: Any, *, pairs: bool) -> Iterator[tuple[str, str]]:
    """Yield why a data block of ours cannot be trained on by a method that wants pairs, or one that does not."""
    if isinstance(data, Data) and isinstance(data, PreferenceData) != pairs:
        wanted = "pairs of replies (type: preference)" if pairs else "single documents (type: sft or causal)"
        yield "data", f"this trainer needs {wanted}, and {type(data).__name__} gives others"
