"""Rows -> token ids and masks, a batch at a time. Imports numpy: load it where it is used.

Text is tokenized here and nowhere else, with `add_special_tokens=False`: what the template or the recipe does not
write is not there, so a BOS cannot come twice.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Protocol

import attrs
import numpy as np

from posttrain.blocks.chat import ChatRenderer, Rendered, control_tokens
from posttrain.blocks.readers import Row
from posttrain.blocks.schemas import Refused
from posttrain.errors import DataError


@attrs.frozen
class Refusal:
    """A row that was left out, and why."""

    number: int
    place: str
    reason: str


@attrs.frozen
class Flat:
    """Documents end to end."""

    ids: np.ndarray
    """uint16 or uint32 [tokens]."""
    mask: np.ndarray
    """uint8 [tokens]: 1 where a token is supervised."""
    offsets: np.ndarray
    """int64 [documents + 1]: where each document begins."""
    rows: np.ndarray
    """int64 [documents]: the number of the row in its source."""
    supervised: np.ndarray
    """int32 [documents]: supervised tokens."""
    refusals: list[Refusal]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.diff(self.offsets)


class Encoder(Protocol):
    """Turns rows into documents. Must survive pickling: worker processes get a copy."""

    def __call__(self, rows: list[Row]) -> Flat: ...


def flat(documents: list[tuple[np.ndarray, np.ndarray]], rows: list[int], refusals: list[Refusal]) -> Flat:
    """Lay documents (ids, mask) end to end."""
    lengths = [len(ids) for ids, _ in documents]
    return Flat(
        ids=np.concatenate([ids for ids, _ in documents]) if documents else np.zeros(0, np.uint32),
        mask=np.concatenate([mask for _, mask in documents]) if documents else np.zeros(0, np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        rows=np.array(rows, np.int64),
        supervised=np.array([mask.sum() for _, mask in documents], np.int32),
        refusals=refusals,
    )


@attrs.frozen
class ChatEncoder:
    """Conversations: rendered with the chat template, trained where the renderer's spans are."""

    renderer: ChatRenderer
    conversation: Callable[[dict[str, Any]], dict[str, Any]]
    """Raw row -> conversation; a method of the data block, so that users can override it."""

    def __call__(self, rows: list[Row]) -> Flat:
        """Encode rows; those that cannot be used come back as refusals."""
        kept: list[tuple[Row, Rendered]] = []
        refusals = []
        for row in rows:
            try:
                rendered = self.render(row)
                _refuse_surrogates(rendered.text)
            except Refused as refused:
                refusals.append(Refusal(row.number, row.place, str(refused)))
            else:
                kept.append((row, rendered))
        tokenizer = self.renderer.tokenizer
        control = np.zeros(len(tokenizer) + 1, bool)
        control[list(control_tokens(tokenizer).values())] = True
        encodings = backend(tokenizer).encode_batch([r.text for _, r in kept], add_special_tokens=False)
        documents, numbers = [], []
        for (row, rendered), encoding in zip(kept, encodings, strict=True):
            try:
                documents.append(masked(rendered, encoding, control))
                numbers.append(row.number)
            except Refused as refused:
                refusals.append(Refusal(row.number, row.place, str(refused)))
        return flat(documents, numbers, refusals)

    def render(self, row: Row) -> Rendered:
        """Return a row as text with spans."""
        try:
            return self.renderer.render(self.conversation(row.values))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from None


@attrs.frozen
class TextEncoder:
    """Plain text: every token is supervised but the first of a document, which nothing predicts."""

    tokenizer: Any
    bos: bool
    eos: bool
    column: str

    def __call__(self, rows: list[Row]) -> Flat:
        """Encode rows; those that cannot be used come back as refusals."""
        texts, numbers, refusals = [], [], []
        for row in rows:
            try:
                texts.append(self._text(row))
                numbers.append(row.number)
            except Refused as refused:
                refusals.append(Refusal(row.number, row.place, str(refused)))
        first = [self.tokenizer.bos_token_id] if self.bos else []
        last = [self.tokenizer.eos_token_id] if self.eos else []
        documents = []
        for encoding in backend(self.tokenizer).encode_batch_fast(texts, add_special_tokens=False):
            ids = np.array(first + encoding.ids + last, np.uint32)
            mask = np.ones(len(ids), np.uint8)
            mask[:1] = 0
            documents.append((ids, mask))
        return flat(documents, numbers, refusals)

    def _text(self, row: Row) -> str:
        if self.column not in row.values:
            raise DataError(
                f"{row.place}: there is no column {self.column!r} (columns: {', '.join(row.values)}); "
                "name yours with `columns: {text: ...}` on the source"
            )
        text = row.values[self.column]
        if not isinstance(text, str):
            raise Refused(f"{self.column!r} is not text")
        if not text:
            raise Refused("the text is empty")
        _refuse_surrogates(text)
        return text


def backend(tokenizer: Any) -> Any:
    """Return the Rust tokenizer of a fast tokenizer, set to neither cut nor pad.

    Raises:
        DataError: it has none.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer: it cannot say which characters a token stands for, and "
            "masks need that. Use a tokenizer with a tokenizer.json"
        )
    rust = tokenizer.backend_tokenizer
    rust.no_truncation()
    rust.no_padding()
    return rust


def masked(rendered: Rendered, encoding: Any, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (uint32) and mask (uint8): 1 for tokens that overlap a trained span.

    Raises:
        Refused: the text of a message became a control token, or nothing is left to train.
    """
    ids = np.array(encoding.ids, np.uint32)
    mask = np.zeros(len(ids), np.uint8)
    starts = [start for _, start, _ in rendered.pieces]
    for token in np.flatnonzero(control[ids]).tolist():
        start, end = encoding.token_to_chars(token)
        number = bisect_right(starts, end - 1) - 1
        if number >= 0 and rendered.pieces[number][2] > start:
            raise Refused(f"the text of a message holds the control token {rendered.text[start:end].strip()!r}")
    for start, end in rendered.spans:
        first = _token_at(encoding, range(start, end))
        last = _token_at(encoding, range(end - 1, start - 1, -1))
        if first is not None and last is not None:
            mask[first : last + 1] = 1
    mask[:1] = 0
    if not mask.any():
        raise Refused("no token is supervised")
    return ids, mask


def explain(rendered: Rendered, encoding: Any, mask: np.ndarray) -> list[tuple[str, bool, str]]:
    """Return (text, supervised, role) for each token, for people to look at."""
    tokens = []
    ends = [end for end, _ in rendered.turns]
    shown = 0
    for number, (start, end) in enumerate(encoding.offsets):
        turn = min(bisect_right(ends, start), len(ends) - 1)
        text = rendered.text[max(start, shown) : end]  # a character of several tokens is shown with the first
        shown = max(shown, end)
        tokens.append((text, bool(mask[number]), rendered.turns[turn][1] if rendered.turns else ""))
    return tokens


def _token_at(encoding: Any, characters: range) -> int | None:
    """Return the token of the first of these characters that has one (a normalizer may have dropped some)."""
    return next((t for c in characters if (t := encoding.char_to_token(c)) is not None), None)


def _refuse_surrogates(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused("the text holds half of a UTF-16 surrogate pair") from None
