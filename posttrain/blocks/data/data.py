"""Data blocks: sources in, micro-batches out."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
from attrs.converters import optional as or_none
from attrs.validators import and_, ge, gt, lt, min_len

from posttrain.blocks.data.chat import ChatRenderer
from posttrain.blocks.data.encode import ChatEncoder, Encoder, TextEncoder, Token
from posttrain.blocks.data.identity import of_streams, of_tables
from posttrain.blocks.data.loader import MapLoader, StreamLoader
from posttrain.blocks.data.pairs import CHOSEN, REJECTED, pair
from posttrain.blocks.data.schemas import Refused, Sample, conversation
from posttrain.blocks.data.sources import Source, as_sources
from posttrain.blocks.data.store import default_cache, table
from posttrain.blocks.data.streams import Stream, StreamEncoding
from posttrain.blocks.data.views import Documents, Limits, documents, totals
from posttrain.blocks.layout import Example, collate, collate_pairs
from posttrain.errors import DataError
from posttrain.interfaces import Batch, Loaders
from posttrain.registry import block, key


@attrs.frozen
class Prepared:
    """Data that is ready to train on."""

    train: Documents
    eval: Documents | None
    ledger: dict[str, Any]


@attrs.frozen
class Preview:
    """One document, to look at."""

    source: str
    tokens: list[Token]
    side: str = ""
    """Of a pair: `chosen` or `rejected`."""


@attrs.frozen(kw_only=True, slots=False)
class Data:
    """What data blocks share: from sources to loaders. A subclass says how rows become tokens, in `encoder`."""

    policies: ClassVar[tuple[str, ...]] = ("drop", "truncate", "split")
    """What may happen to documents that are too long, besides an error."""

    sources: list[Source] = key(check=min_len(1), convert=as_sources)
    """What to train on: files, folders, hub datasets."""
    eval_sources: list[Source] = key(factory=list, convert=as_sources)
    """What to evaluate on."""
    eval_split: float = key(0.0, check=and_(ge(0), lt(1)))
    """Share of the rows of `sources` that is held out and evaluated on: always the same rows, whatever the seed."""
    max_length: int = key(2048, check=gt(1))
    """Tokens in a row: the most that a document may have, and what packing fills."""
    overflow: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to a document that is longer: say so and stop, leave it out, keep its beginning, or cut it up."""
    invalid: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be trained on: say so and stop, or leave it out. Either way it is counted."""
    packing: bool = key(True, also=("pack_samples",))
    """Put as many documents into a row as fit; each sees itself alone. Otherwise one document per row, padded."""
    cache_dir: Path | None = key(None, convert=or_none(Path))
    """Where tokenized rows are kept; $POSTTRAIN_CACHE or ~/.cache/posttrain by default."""
    window: int = key(2048, check=gt(0))
    """Rows of a stream that are shuffled and packed together."""

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what turns rows into documents."""
        raise NotImplementedError

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what can be seen to be wrong without reading anything."""
        if self.eval_split and self.eval_sources:
            yield "eval_split", "holds out rows of `sources`, but `eval_sources` is given too; choose one"
        if self.streams and self.eval_split:
            yield "eval_split", "rows cannot be held out of a stream; give `eval_sources`"
        for source in self.eval_sources:
            if source.stream:
                yield "eval_sources", f"{source.label} cannot be a stream: every evaluation needs the same rows"

    @property
    def row_length(self) -> int:
        """Tokens in a packed row."""
        return self.max_length

    @property
    def collate(self) -> Callable[[list[list[Example]], int], Batch]:
        """What makes rows of examples a batch."""
        return collate

    @property
    def streams(self) -> bool:
        """Whether rows are read while training."""
        return any(source.stream for source in self.sources)

    @property
    def limits(self) -> Limits:
        """The policies for rows that are too long or unusable."""
        return Limits(self.max_length, self.overflow, self.invalid, self.policies)

    def prepare(self, tokenizer: Any) -> Prepared:
        """Tokenize everything that is not in the cache yet.

        Raises:
            DataError: a source cannot be read, or rows do not fit the policies.
        """
        if self.streams:
            raise DataError("a streaming source is read while training; there is nothing to prepare")
        train, ledger = self._documents(self.sources, tokenizer, self.eval_split, False)
        held_out = None
        if self.eval_split:
            held_out, ledger["eval"] = self._documents(once(self.sources), tokenizer, self.eval_split, True)
        elif self.eval_sources:
            held_out, ledger["eval"] = self._documents(once(self.eval_sources), tokenizer, 0.0, False)
        return Prepared(train, held_out, ledger)

    def build(self, tokenizer: Any, micro_batch_size: int, rank: int, world_size: int, seed: int) -> Loaders:
        """Return loaders for one rank, and the ledger."""
        shape: dict[str, Any] = {
            "max_length": self.row_length, "packing": self.packing, "micro_batch_size": micro_batch_size, "rank": rank,
            "world_size": world_size, "seed": seed, "pad_id": tokenizer.pad_token_id or 0, "collate": self.collate,
        }  # fmt: skip
        if self.streams:
            return self._streaming(tokenizer, shape)
        prepared = self.prepare(tokenizer)
        train = MapLoader(examples=prepared.train, **shape)
        prepared.ledger["packing"] = {"rows": len(train.plan(0)), "filled": round(train.fill(), 4)}
        held_out = MapLoader(examples=prepared.eval, **shape) if prepared.eval is not None else None
        identity = partial(of_tables, prepared.train.tables)
        return Loaders(train=train, eval=held_out, ledger=prepared.ledger, identity=identity)

    def preview(self, tokenizer: Any, count: int) -> Iterator[Preview]:
        """Yield the first rows of each source as tokens.

        Raises:
            DataError: one of them cannot be trained on.
        """
        encoder = self.encoder(tokenizer)
        for source in self.sources:
            for row, _ in islice(source.read(source.open()), count):
                try:
                    for side, tokens in zip(encoder.sides, encoder.show(row.values), strict=True):
                        yield Preview(row.place, tokens, side)
                except Refused as refused:
                    raise DataError(f"{row.place}: {refused}") from None

    def _documents(
        self, sources: list[Source], tokenizer: Any, held_out: float, want_held_out: bool
    ) -> tuple[Documents, dict[str, Any]]:
        encoder, cache = self.encoder(tokenizer), self.cache_dir or default_cache()
        tables = [table(source, encoder, cache) for source in sources]
        weights = [source.weight for source in sources]
        found, ledger = documents(tables, weights, self.limits, held_out, want_held_out)
        return found, {"sources": ledger, "total": totals(ledger)}

    def _streaming(self, tokenizer: Any, shape: dict[str, Any]) -> Loaders:
        encoding = StreamEncoding(self.encoder(tokenizer), self.limits, [source.label for source in self.sources])
        train = StreamLoader(
            stream=Stream(self.sources, shape["seed"]), encode=encoding.encode, window=self.window, **shape
        )
        held_out, ledger = None, {"sources": encoding.ledger}
        if self.eval_sources:
            documents_, ledger["eval"] = self._documents(once(self.eval_sources), tokenizer, 0.0, False)
            held_out = MapLoader(examples=documents_, **shape)
        return Loaders(train=train, eval=held_out, ledger=ledger, identity=partial(of_streams, self.sources))


def once(sources: list[Source]) -> list[Source]:
    """Return sources without their weights: an evaluation sees each row once."""
    return [attrs.evolve(source, weight=1.0) for source in sources]


@block("data", "sft")
class SFTData(Data):
    """Conversations; the replies in them are trained."""

    train_on: list[str] = key(factory=lambda: ["assistant"], check=min_len(1))
    """Roles whose messages are trained, from behind the generation prompt through the end-of-turn token."""
    template_args: dict[str, Any] = attrs.field(factory=dict)
    """More variables for the chat template (`enable_thinking`)."""

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what renders and tokenizes conversations."""
        return ChatEncoder(ChatRenderer(tokenizer, self.train_on, self.template_args), self.sample)

    def sample(self, row: dict[str, Any]) -> Sample:
        """Return what a row says: one conversation."""
        return Sample([self.conversation(row)])

    def conversation(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row's `{"messages": [...]}`; override it for a schema of your own."""
        return conversation(row)


@block("data", "preference")
class PreferenceData(Data):
    """Pairs of conversations that answer the same messages, one better than the other.

    The two sides of a pair are never torn apart. `max_length` is that of a side; a packed row holds twice as many
    tokens. Rows whose sides are equal or empty are refused or dropped as `invalid` says.
    """

    policies: ClassVar[tuple[str, ...]] = ("drop", "truncate")

    max_length: int = key(2048, check=gt(1))
    """Tokens that each side may have; a packed row holds twice as many."""
    overflow: Literal["error", "drop", "truncate"] = "error"
    """What happens to a pair with a side that is longer: say so and stop, leave the pair out, or keep the beginning of
    its sides."""
    template_args: dict[str, Any] = attrs.field(factory=dict)
    """More variables for the chat template (`enable_thinking`)."""

    @property
    def row_length(self) -> int:
        """Tokens in a packed row: at least one pair fits."""
        return 2 * self.max_length

    @property
    def collate(self) -> Callable[[list[list[Example]], int], Batch]:
        """What makes rows of pairs a batch."""
        return partial(collate_pairs, packing=self.packing)

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what renders and tokenizes both sides."""
        renderer = ChatRenderer(tokenizer, template_args=self.template_args)
        return ChatEncoder(renderer, self.pair, (CHOSEN, REJECTED))

    def pair(self, row: dict[str, Any]) -> Sample:
        """Return a row's chosen and rejected conversation; override it for a schema of your own (see pairs.py)."""
        return pair(row)


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
        return TextEncoder(tokenizer, self.text_column, self.bos, self.eos)


def unfit(data: Any, *, pairs: bool) -> Iterator[tuple[str, str]]:
    """Yield why a data block of ours cannot be trained on by a method that wants pairs, or one that does not."""
    if isinstance(data, Data) and isinstance(data, PreferenceData) != pairs:
        wanted = "pairs of replies (type: preference)" if pairs else "single documents (type: sft or causal)"
        yield "data", f"this trainer needs {wanted}, and {type(data).__name__} gives others"
