"""Single replies with a verdict: good or bad. Each comes with the reply of another row, to estimate a divergence."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import attrs
from attrs.validators import gt

from posttrain.batch import Batch, Extra
from posttrain.blocks.data.data import Data, anchor_of, pad_id
from posttrain.blocks.data.encoding.encoders import ChatEncoder, Encoded, Encoder, Values, apart
from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.schemas import VERDICTS, Sample, Schema, conversation, schema
from posttrain.blocks.images.arrange import IMAGES
from posttrain.blocks.layout import Column, Columns, Document, Example, collate_groups
from posttrain.registry import block, key

REPLY, OTHER = "reply", "reply of another row"
OWN: Columns = {"good": Column("example", "bool"), "matched": Column("example", "bool")}
"""Whether people found the reply good; and whether there is a reply of another row beside it."""


@block("data", "unpaired")
class UnpairedData(Data):
    """Conversations whose last reply people found good or bad: any schema of single replies, and a column `label` (or
    `kto_tag`) with true or false."""

    policies: ClassVar[tuple[str, ...]] = ("drop",)
    takes_images: ClassVar[bool] = True

    overflow: Literal["error", "drop"] = "error"
    """What happens to a row that is too long, also with the reply of its neighbour: say so and stop, or leave it
    out."""
    template_args: dict[str, Any] = key(factory=dict, also=("chat_template_kwargs",))
    """More variables for the chat template (`enable_thinking`)."""
    max_length: int = key(2048, check=gt(1))
    """Tokens that a conversation may have; a packed row holds twice as many."""

    @property
    def row_length(self) -> int:
        """Tokens in a packed row: a reply and that of another row fit."""
        return 2 * self.max_length

    @property
    def columns(self) -> Columns:
        """What examples carry."""
        return {**super().columns, **OWN}

    def collator(self, tokenizer: Any) -> Callable[[list[list[Example]], int], Batch]:
        """Return what makes a batch of replies, with the replies of other rows as a batch of its own, `others`."""
        columns = self.columns_of(tokenizer)
        lay = partial(collate_groups, pad_id=pad_id(tokenizer), packing=self.packing, columns=columns)
        return partial(_collated, lay=self.with_images(lay, tokenizer), columns=columns)

    def fullest(self, length: int) -> Example:
        """Return an example as large as can be."""
        (document,) = super().fullest(length).documents
        return Example((document, document), dict.fromkeys(self.keep) | {"good": True, "matched": True})

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what renders and tokenizes conversations."""
        anchor, columns, sight = anchor_of(tokenizer), self.columns_of(tokenizer), self.sight(tokenizer)
        renderer = ChatRenderer(tokenizer, template_args=self.template_args, last_turn_only=True, anchor=anchor)
        return UnpairedEncoder(ChatEncoder(renderer, self.sample, _schema, columns=columns, sight=sight))

    def sample(self, row: dict[str, Any]) -> Sample:
        """Return what a row says: one conversation, and whether its reply is a good one."""
        name = next((name for name in VERDICTS if row.get(name) is not None), None)
        if name is None:
            raise Refused(f"there is no verdict: no column {' or '.join(VERDICTS)} with true or false")
        good = {1: True, 0: False, "true": True, "false": False}  # True is 1
        said = row[name].strip().lower() if isinstance(row[name], str) else row[name]
        if not isinstance(said, str | bool | int) or said not in good:
            raise Refused(f"{name!r} is neither true nor false")
        plain = {column: value for column, value in row.items() if column != name}
        return Sample([conversation(plain)], {"good": good[said], "matched": True})


def _schema(row: Values) -> Schema:
    found = schema({name: value for name, value in row.items() if name not in VERDICTS})
    return Schema(found.name, (*found.columns, *(name for name in VERDICTS if name in row)))


@attrs.define
class UnpairedEncoder:
    """Conversations as tokens, each with the reply of the row that follows in the file."""

    single: ChatEncoder
    sides: tuple[str, ...] = (REPLY, OTHER)

    @property
    def columns(self) -> Columns:
        """What examples carry."""
        return self.single.columns

    @property
    def reading(self) -> Any:
        """Of the rows so far."""
        return self.single.reading

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once; the last takes the reply of the first."""
        found = self.single.encode(rows)
        good = [one for one in found if not isinstance(one, Refused)]
        after = dict(zip(map(id, good), [*good[1:], *good[:1]], strict=True))
        return [one if isinstance(one, Refused) else _beside(one, after[id(one)]) for one in found]

    def show(self, row: Values) -> list[list[Any]]:
        """Return the tokens of a row's conversation; the other reply is not known of a single row."""
        (shown,) = self.single.show(row)
        return [shown, []]

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""
        return "unpaired " + self.single.fingerprint()


def _beside(one: Example, other: Example) -> Example:
    """Return an example with the reply of another one to its own prompt."""
    import numpy as np

    (ids, mask), (theirs, their_mask) = one.documents[0], other.documents[0]
    first, begin = int(mask.argmax()), int(their_mask.argmax())
    reply = theirs[begin:]
    mixed: Document = np.concatenate([ids[:first], reply]), np.concatenate([mask[:first], their_mask[begin:]])
    values = one.values | {"matched": one is not other}
    if IMAGES in values:
        (own,), (others,) = values[IMAGES], other.values[IMAGES]
        moved = [span | {"at": span["at"] - begin + first} for span in others if span["at"] >= begin]
        values[IMAGES] = own, [span for span in own if span["at"] < first] + moved
    return Example(((ids, mask), mixed), values)


def _collated(rows: list[list[Example]], multiple: int, *, lay: Callable[..., Batch], columns: Columns) -> Batch:
    first, second = ([[apart(one, (), columns)[i] for one in row] for row in rows] for i in range(2))
    others, batch = lay(second, multiple), lay(first, multiple)
    good = int(batch["good"].sum())
    counted: dict[str, float] = {"replies": len(batch["good"]), "good": good, "bad": len(batch["good"]) - good}
    if IMAGES in batch.counted:
        counted[IMAGES] = batch.counted[IMAGES] + others.counted[IMAGES]
    return batch.but(weight=counted["replies"], counted=counted, others=Extra(others))
