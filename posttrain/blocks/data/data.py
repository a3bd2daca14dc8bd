"""Data blocks: sources in, micro-batches out."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
from attrs.converters import optional as or_none
from attrs.validators import and_, ge, gt, le, lt, min_len, optional

from posttrain.batch import FIELDS, Batch
from posttrain.blocks.data.encoding.encoders import Encoder, Token
from posttrain.blocks.data.identity import of_streams, of_tables
from posttrain.blocks.data.loader import MapLoader, StreamLoader
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.schemas import Sample
from posttrain.blocks.data.rows.sight import InRow, Sight
from posttrain.blocks.data.sources import Source, as_sources
from posttrain.blocks.data.store import table
from posttrain.blocks.data.streams import Stream, StreamEncoding
from posttrain.blocks.data.views import Documents, Limits, by_share, documents, totals
from posttrain.blocks.images.arrange import IMAGES, shown
from posttrain.blocks.images.pixels import Pictures
from posttrain.blocks.images.processor import images_of
from posttrain.blocks.layout import Column, Columns, Example, collate
from posttrain.errors import DataError
from posttrain.interfaces import Loaders
from posttrain.registry import key
from posttrain.values import default_cache

READING = 2
"""Threads that decode images ahead."""


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
    """Of a pair `chosen` or `rejected`; of a conversation that became several documents `turn 1` and so on."""
    columns: dict[str, Any] = attrs.field(factory=dict)
    """What the ledger says of the source's columns so far."""


@attrs.frozen(kw_only=True, slots=False)
class Data:
    """What data blocks share: from sources to loaders. A subclass says how rows become tokens, in `encoder`."""

    policies: ClassVar[tuple[str, ...]] = ("drop", "truncate", "split")
    """What may happen to documents that are too long, besides an error."""
    takes_images: ClassVar[bool] = False
    """Whether rows may hold images, for a model that sees any."""
    ahead: ClassVar[int] = 0
    """Threads that read and collate while others are trained on; for rows that take long to read, as images do."""

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
    num_proc: int | None = key(None, also=("dataset_processes",), check=optional(gt(0)))
    """Processes that tokenize; by default one a core, once a few seconds have shown that there is much to do."""
    window: int = key(2048, check=gt(0))
    """Rows of a stream that are shuffled and packed together."""
    image_root: Path | None = key(None, convert=or_none(Path), also=("image_folder",))
    """Where relative paths of images begin; beside the file that names them by default."""
    max_megapixels: float = key(50.0, check=and_(gt(0), le(89)))
    """Images with more million pixels are refused before they are decoded; above 89 Pillow takes them for an attack."""
    keep: list[str] = attrs.field(factory=list)
    """Columns of the rows that come along into batches, such as an answer for a reward to compare with:
    `batch["answer"]` is then a list with an entry for each example."""

    def encoder(self, tokenizer: Any) -> Encoder:
        """Return what turns rows into documents."""
        raise NotImplementedError

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what can be seen to be wrong without reading anything."""
        if self.eval_split and self.eval_sources:
            yield "eval_split", "holds out rows of `sources`, but `eval_sources` is given too; choose one"
        if self.streams and self.eval_split:
            yield "eval_split", "rows cannot be held out of a stream; give `eval_sources`"
        for name in self.keep:
            if name in FIELDS:
                yield "keep", f"{name!r} has a meaning in a batch; rename it with `columns` of its source"
        if len({source.share is None for source in self.sources}) > 1:
            yield "sources", "some have a share and some have not: give all of them one, or none"
        for source in self.eval_sources:
            if source.share is not None:
                yield "eval_sources", f"{source.label}: an evaluation sees every row once; leave `share` out"
            if source.stream:
                yield "eval_sources", f"{source.label} cannot be a stream: every evaluation needs the same rows"

    @property
    def row_length(self) -> int:
        """Tokens in a packed row."""
        return self.max_length

    @property
    def columns(self) -> Columns:
        """What examples carry beside their tokens."""
        return {name: Column("example", "json") for name in self.keep}

    def collator(self, tokenizer: Any) -> Callable[[list[list[Example]], int], Batch]:
        """Return what makes a batch of rows of examples; the width of rows is a multiple of the number given with them.

        Args:
            tokenizer: of the run; None where tokens mean nothing, as in a plan.
        """
        made = partial(collate, pad_id=pad_id(tokenizer), columns=self.columns_of(tokenizer))
        return self.with_images(made, tokenizer)

    def fullest(self, length: int) -> Example:
        """Return an example as large as can be: documents of `length` tokens, all of which are supervised."""
        import numpy as np

        document = np.arange(length) % 2 + 1, np.ones(length, dtype=bool)
        return Example((document,), dict.fromkeys(self.keep))

    def columns_of(self, tokenizer: Any) -> Columns:
        """Return what examples carry for a tokenizer's model: also their images, if it sees any."""
        seen = self.takes_images and images_of(tokenizer) is not None
        return {**self.columns, **({IMAGES: Column("span", "json")} if seen else {})}

    def sight(self, tokenizer: Any) -> Sight | None:
        """Return what knows the images of rows; None for a model that sees none."""
        processor = images_of(tokenizer)
        if processor is None or not self.takes_images:
            return None
        cache = self.cache_dir or default_cache()
        pictures = Pictures(processor, self.max_megapixels, cache / "downloads", InRow(self.sample))
        return Sight(pictures, tokenizer, self.image_root)

    def sample(self, row: dict[str, Any]) -> Sample:
        """Return what a row says."""
        raise NotImplementedError

    def with_images(self, lay: Callable[..., Batch], tokenizer: Any) -> Callable[[list[list[Example]], int], Batch]:
        """Return a collator that also brings the images of its rows."""
        sight = self.sight(tokenizer)
        if sight is None:
            return lay

        def collated(rows: list[list[Example]], multiple: int = 1) -> Batch:
            return shown(lay(rows, multiple), sight.pictures.processor, sight.pictures.read)

        return collated

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
            "world_size": world_size, "seed": seed, "collate": self.collator(tokenizer),
            "ahead": self.ahead if images_of(tokenizer) is None else max(self.ahead, READING),
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
        for source in self.sources:
            encoder = self.encoder(tokenizer)
            for row, _ in islice(source.read(source.open()), count):
                try:
                    shown = encoder.show(row.values)
                    turns = [f"turn {n}" for n in range(1, len(shown) + 1)] if len(shown) > 1 else [""]
                    names = encoder.sides if len(encoder.sides) > 1 else turns
                    for name, tokens in zip(names, shown, strict=True):
                        yield Preview(row.place, tokens, name, encoder.reading.summary())
                except Refused as refused:
                    raise DataError(f"{row.place}: {refused}") from None

    def _documents(
        self, sources: list[Source], tokenizer: Any, held_out: float, want_held_out: bool
    ) -> tuple[Documents, dict[str, Any]]:
        encoder, cache = self.encoder(tokenizer), self.cache_dir or default_cache()
        tables = [table(source, encoder, cache, self.num_proc) for source in sources]
        weights = [source.weight for source in sources]
        found, ledger = documents(tables, weights, self.limits, held_out, want_held_out)
        if sources[0].share is not None:
            found = by_share(found, [float(source.share or 0) for source in sources])
        return found, {"sources": ledger, "total": totals(ledger)}

    def _streaming(self, tokenizer: Any, shape: dict[str, Any]) -> Loaders:
        encoding = StreamEncoding(self.encoder(tokenizer), self.limits, names_of(self.sources))
        stream = Stream(self.sources, shape["seed"])
        train = StreamLoader(stream=stream, encode=encoding.encode, window=self.window, **shape)
        held_out, ledger = None, {"sources": train.ledger}
        if self.eval_sources:
            documents_, ledger["eval"] = self._documents(once(self.eval_sources), tokenizer, 0.0, False)
            held_out = MapLoader(examples=documents_, **shape)
        return Loaders(train=train, eval=held_out, ledger=ledger, identity=partial(of_streams, self.sources))


def names_of(sources: list[Source]) -> list[str]:
    """Return what the ledger calls sources, all different."""
    labels = [source.label for source in sources]
    return [f"{one} #{n + 1}" if one in labels[:n] else one for n, one in enumerate(labels)]


def anchor_of(tokenizer: Any) -> str | None:
    """Return what chat templates write where an image stands; None for a model that sees none."""
    images = images_of(tokenizer)
    return None if images is None else images.token


def pad_id(tokenizer: Any) -> int:
    """Return what fills rows up."""
    return 0 if tokenizer is None else int(tokenizer.pad_token_id or 0)


def once(sources: list[Source]) -> list[Source]:
    """Return sources without their weights: an evaluation sees each row once."""
    return [attrs.evolve(source, weight=1.0, share=None) for source in sources]
