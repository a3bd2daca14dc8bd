"""Rows -> token ids, and which of them are supervised. Text is tokenized here and nowhere else."""

import hashlib
import inspect
import json
import marshal
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import attrs

from posttrain.blocks.data.rows.chat import ChatRenderer, Rendered, special_tokens
from posttrain.blocks.data.rows.messages import Refused
from posttrain.blocks.data.rows.schemas import Reading, Sample, Schema
from posttrain.blocks.layout import Columns, Document, Example

if TYPE_CHECKING:
    import numpy as np

ACCESS = re.compile(r"""(?:\.|\[["']|get\(["'])(\w+)""")
"""How a template takes a key of a message: `m.name`, `m['name']`, `m.get('name')`."""
Values: TypeAlias = dict[str, Any]
Encoded: TypeAlias = Example | Refused
"""What the row became, or why it cannot be trained on."""
Token: TypeAlias = tuple[str, bool, str]
"""Text, supervised, role: for showing."""


class Encoder(Protocol):
    """Turns rows into examples."""

    @property
    def sides(self) -> tuple[str, ...]:
        """What the documents of an example are called; a single one needs no name."""

    @property
    def columns(self) -> Columns:
        """The values that examples carry beside their tokens."""

    @property
    def reading(self) -> Reading:
        """Which columns of the rows were read so far, and which were not."""

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once; `apart` gives the examples of one that became several."""

    def show(self, row: Values) -> list[list[Token]]:
        """Return the tokens of a row's documents for a person to look at; raises Refused as `encode` returns it."""

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""


@attrs.define
class ChatEncoder:
    """Conversations, rendered with a chat template; the trained spans of the text become supervised tokens."""

    renderer: ChatRenderer
    sample: Callable[[Values], Sample]
    """Row -> its conversations."""
    schema: Callable[[Values], Schema] | None = None
    """Row -> which of its columns `sample` reads, if that is known."""
    sides: tuple[str, ...] = ("",)
    """What the documents of an example are called."""
    columns: Columns = attrs.field(factory=dict)
    """What examples carry: what `sample` gives, and otherwise columns of the row."""
    reading: Reading = attrs.field(factory=Reading)
    """Of the rows so far."""
    special: re.Pattern[str] = attrs.field(init=False)
    """The tokenizer's control tokens."""

    def __attrs_post_init__(self) -> None:
        tokens = sorted(special_tokens(self.renderer.tokenizer), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        words = {word for template in self.renderer.templates.values() for word in ACCESS.findall(template)}
        self.reading.keys |= words

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once; the tokenizer's own threads share the work."""
        rendered = [self._rendered(row) for row in rows]
        good = [side for found in rendered if not isinstance(found, Refused) for side in found[0]]
        encodings = iter(tokenize(self.renderer.tokenizer, [side.text for side in good]))
        found: list[Encoded] = []
        for row in rendered:
            found.append(row if isinstance(row, Refused) else self._encoded(*row, list(islice(encodings, len(row[0])))))
        return found

    def show(self, row: Values) -> list[list[Token]]:
        """Return the tokens of a row as text, with the role of the message that each belongs to."""
        found = self._rendered(row)
        if isinstance(found, Refused):
            raise found
        sides, values = found
        encodings = tokenize(self.renderer.tokenizer, [side.text for side in sides])
        encoded = self._encoded(sides, values, encodings)
        if isinstance(encoded, Refused):
            raise encoded
        shown = []
        for side, encoding, (_, mask) in zip(sides, encodings, encoded.documents, strict=True):
            roles = [next((role for end, role in side.turns if at < end), "") for at, _ in encoding.offsets]
            shown.append(list(zip(readable(encoding, side.text), mask.tolist(), roles, strict=True)))
        return shown

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""
        renderer = self.renderer
        said = [
            renderer.templates[True], renderer.templates[False], sorted(renderer.train_on), renderer.template_args,
            renderer.last_turn_only, renderer.split_turns,
        ]  # fmt: skip
        return _hash(
            tokenizer_text(renderer.tokenizer), json.dumps(said, default=str), *self.sides, code_of(self.sample)
        )

    def _rendered(self, row: Values) -> tuple[list[Rendered], Values] | Refused:
        self.reading.note(row, self.schema, self.columns)
        try:
            sample = self.sample(row)
            values = sample.values | kept(row, self.columns.keys() - sample.values.keys())
            found = [turn for one in sample.conversations for turn in self.renderer.documents(one)]
            return [self._render(conversation) for conversation in found], values
        except Refused as refused:
            return refused

    def _render(self, conversation: Values) -> Rendered:
        found = self.renderer.render(conversation)
        refuse_surrogates(found.text)
        for _, start, end in found.pieces:
            if control := self.special.search(found.text, start, end):
                raise Refused(f"the text of a message holds the control token {control.group()}")
        return found

    def _encoded(self, sides: list[Rendered], values: Values, encodings: list[Any]) -> Encoded:
        import numpy as np

        documents: list[Document] = []
        for side, encoding in zip(sides, encodings, strict=True):
            mask = supervised(encoding, side.spans)
            if not mask[1:].any():
                return Refused("no token of it would be supervised")
            documents.append((np.array(encoding.ids, dtype=np.uint32), mask))
        if len(self.sides) > 1 and all(np.array_equal(ids, documents[0][0]) for ids, _ in documents):
            return Refused(f"{' and '.join(self.sides)} are equal")
        return Example(tuple(documents), values)


@attrs.define
class TextEncoder:
    """Plain documents, every token of which is supervised."""

    tokenizer: Any
    column: str
    bos: bool
    eos: bool
    sides: tuple[str, ...] = ("",)
    columns: Columns = attrs.field(factory=dict)
    """Columns of the row that examples carry."""
    reading: Reading = attrs.field(factory=Reading)
    """Of the rows so far."""

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once."""
        import numpy as np

        for row in rows:
            self.reading.note(row, lambda _: Schema(self.column, (self.column,)), self.columns)

        texts = [self._text(row) for row in rows]
        encodings = iter(tokenize(self.tokenizer, [text for text in texts if isinstance(text, str)]))
        found: list[Encoded] = []
        for row, text in zip(rows, texts, strict=True):
            if isinstance(text, Refused):
                found.append(text)
                continue
            ids = [*self._bos(), *next(encodings).ids, *self._eos()]
            mask = np.ones(len(ids), dtype=bool)
            document = np.array(ids, dtype=np.uint32), mask
            values = kept(row, self.columns)
            found.append(Example((document,), values) if len(ids) > 1 else Refused("it is a single token"))
        return found

    def show(self, row: Values) -> list[list[Token]]:
        """Return a row's tokens as text."""
        (encoded,) = self.encode([row])
        if isinstance(encoded, Refused):
            raise encoded
        ((ids, _),) = encoded.documents
        return [[(self.tokenizer.decode([i]), n > 0, "text") for n, i in enumerate(ids.tolist())]]

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""
        return _hash(tokenizer_text(self.tokenizer), repr([self.column, self.bos, self.eos]))

    def _text(self, row: Values) -> str | Refused:
        text = row.get(self.column)
        if not isinstance(text, str) or not text:
            return Refused(f"the column {self.column!r} is missing, empty or not text")
        try:
            refuse_surrogates(text)
            kept(row, self.columns)
        except Refused as refused:
            return refused
        return text

    def _bos(self) -> list[int]:
        return [self.tokenizer.bos_token_id] if self.bos else []

    def _eos(self) -> list[int]:
        return [self.tokenizer.eos_token_id] if self.eos else []


def kept(row: Values, names: Iterable[str]) -> Values:
    """Return the columns of a row that go along with it.

    Raises:
        Refused: there is no such column, or it holds more than plain data.
    """
    for name in names:
        if name not in row:
            raise Refused(f"the column {name!r} that data.keep names is missing")
        try:
            json.dumps(row[name])
        except (TypeError, ValueError):
            raise Refused(f"the column {name!r} that data.keep names holds more than plain JSON data") from None
    return {name: row[name] for name in names}


def apart(example: Example, sides: tuple[str, ...], columns: Columns) -> list[Example]:
    """Return the examples that a row became: its documents one by one, if they are not the sides of a whole."""
    if len(sides) > 1 or len(example.documents) == 1:
        return [example]
    found = []
    for n, document in enumerate(example.documents):
        values = {
            name: value if columns[name].per == "example" else (value[n],) for name, value in example.values.items()
        }
        found.append(Example((document,), values))
    return found


def tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Return the encodings of texts, with nothing added, cut or padded."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return list(backend.encode_batch(texts, add_special_tokens=False))


def refuse_surrogates(text: str) -> None:
    """Refuse text that no encoding can write; one such row would fail the whole batch.

    Raises:
        Refused: it holds half of a UTF-16 surrogate pair.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused("the text holds half of a UTF-16 surrogate pair") from None


def supervised(encoding: Any, spans: list[tuple[int, int]]) -> "np.ndarray":
    """Tell which tokens lie in a span, wholly or in part.

    Only the edges of the spans are looked up: the offsets of all tokens as Python tuples cost more than the rest.

    Args:
        encoding: of the `tokenizers` library, [n] tokens.
        spans: starts and ends, in characters.

    Returns:
        [n] booleans.
    """
    import numpy as np

    mask = np.zeros(len(encoding), dtype=bool)
    for start, end in spans:
        first = _token_at(encoding, range(start, end))
        last = _token_at(encoding, range(end - 1, start - 1, -1))
        if first is None or last is None:
            continue
        while last + 1 < len(mask) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1  # more bytes of the span's last character
        mask[first : last + 1] = True
    return mask


def _token_at(encoding: Any, characters: range) -> int | None:
    """Return the token of the first of these characters that has one: a normalizer may have dropped some."""
    return next((token for c in characters if (token := encoding.char_to_token(c)) is not None), None)


def readable(encoding: Any, text: str) -> Iterator[str]:
    """Yield the text of each token; the bytes of a character that several tokens share go to the first of them."""
    shown = 0
    for start, end in encoding.offsets:
        yield text[max(start, shown) : end]
        shown = max(shown, end)


def tokenizer_text(tokenizer: Any) -> str:
    """Return everything that a tokenizer is made of."""
    return str(tokenizer.backend_tokenizer.to_str()) + repr(sorted(tokenizer.special_tokens_map.items()))


def code_of(method: Callable[..., Any]) -> str:
    """Return what identifies code that a user may have written: the files of its classes, or else their bytecode.

    Whole files, because a method calls what stands beside it. Ours do not count: `store.FORMAT` stands for them.
    """
    owner = type(method.__self__) if inspect.ismethod(method) else method
    classes = inspect.getmro(owner) if inspect.isclass(owner) else (owner,)
    return "\n".join(
        _code(item) for item in classes if item.__module__.partition(".")[0] not in ("builtins", "posttrain")
    )


def _code(item: Any) -> str:
    try:
        return Path(inspect.getfile(item)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # typed at a prompt or into a notebook
        functions = vars(item).items() if inspect.isclass(item) else [(item.__qualname__, item)]
        code = [(name, marshal.dumps(f.__code__)) for name, f in functions if inspect.isfunction(f)]
        return hashlib.sha256(repr(sorted(code)).encode()).hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
