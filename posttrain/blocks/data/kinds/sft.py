"""Conversations, of which the replies are trained."""

from collections.abc import Iterator
from typing import Any, ClassVar

from attrs.validators import min_len

from posttrain.blocks.data.data import Data, anchor_of
from posttrain.blocks.data.encoding.encoders import ChatEncoder, Encoder
from posttrain.blocks.data.rows.chat import ChatRenderer
from posttrain.blocks.data.rows.messages import ROLES
from posttrain.blocks.data.rows.schemas import Sample, conversation, schema
from posttrain.registry import block, key, suggest


@block("data", "sft")
class SFTData(Data):
    """Conversations; the replies in them are trained."""

    takes_images: ClassVar[bool] = True

    train_on: list[str] = key(factory=lambda: ["assistant"], check=min_len(1))
    """Roles whose messages are trained, from behind the generation prompt through the end-of-turn token. What a
    message says of itself goes first: `weight: 0`, `train: false`, `train_detail` (see docs/data.md)."""
    last_turn_only: bool = key(False, also=("mask_history",))
    """Train only what stands behind the last message of a user."""
    split_turns: bool = False
    """Make a document of each turn: what came before it is context, as the template shows it when the turn is
    generated. For reasoning models, whose templates leave out the thoughts of earlier turns."""
    ignore_empty_think: bool = False
    """Do not train `<think></think>` at the beginning of a reply if nothing stands in it, as templates of reasoning
    models write it: the model would forget how to think."""
    template_args: dict[str, Any] = key(factory=dict, also=("chat_template_kwargs",))
    """More variables for the chat template (`enable_thinking`)."""

    @property
    def reads_schemas(self) -> bool:
        """Whether rows are read by schemas.py alone, and not by a method of a subclass."""
        return type(self).conversation is SFTData.conversation and type(self).sample is SFTData.sample

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what contradicts itself."""
        yield from super().check()
        if self.last_turn_only and self.split_turns:
            yield "split_turns", "trains every turn, and last_turn_only the last one alone; choose one"
        for role in self.train_on if self.reads_schemas else ():
            if role not in ROLES:
                yield "train_on", f"{role!r} is no role of a message (known: {', '.join(ROLES)}){suggest(role, ROLES)}"

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what renders and tokenizes conversations."""
        renderer = ChatRenderer(
            tokenizer, self.train_on, self.template_args, self.last_turn_only, self.split_turns, anchor_of(tokenizer),
            self.ignore_empty_think,
        )  # fmt: skip
        return ChatEncoder(
            renderer, self.sample, schema if self.reads_schemas else None, columns=self.columns_of(tokenizer),
            sight=self.sight(tokenizer),
        )  # fmt: skip

    def sample(self, row: dict[str, Any]) -> Sample:
        """Return what a row says: one conversation."""
        return Sample([self.conversation(row)])

    def conversation(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row's `{"messages": [...]}`; override it for a schema of your own."""
        return conversation(row)
