"""Rows -> token ids, and which of them are supervised. Text is tokenized here and nowhere else."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import attrs

from posttrain.blocks.chat import ChatRenderer, Rendered, special_tokens
from posttrain.blocks.schemas import Refused

if TYPE_CHECKING:
    import numpy as np

Values: TypeAlias = dict[str, Any]
Encoded: TypeAlias = "tuple[np.ndarray, np.ndarray] | Refused"
"""Token ids [n] and whether each is supervised [n]; or why the row cannot be trained on."""
Token: TypeAlias = tuple[str, bool, str]
"""Text, supervised, role: for showing."""


class Encoder(Protocol):
    """Turns rows into documents."""

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once."""

    def show(self, row: Values) -> list[Token]:
        """Return a row's tokens for a person to look at; raises Refused if it cannot be trained on."""

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""


@attrs.define
class ChatEncoder:
    """Conversations, rendered with a chat template; the trained spans of the text become supervised tokens."""

    renderer: ChatRenderer
    conversation: Callable[[Values], dict[str, Any]]
    """Row -> `{"messages": [...], "tools"?: [...]}`."""
    special: re.Pattern[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        tokens = sorted(special_tokens(self.renderer.tokenizer), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once; the tokenizer's own threads share the work."""
        rendered = [self._rendered(row) for row in rows]
        good = [found for found in rendered if isinstance(found, Rendered)]
        encodings = iter(tokenize(self.renderer.tokenizer, [found.text for found in good]))
        return [self._encoded(found, next(encodings)) if isinstance(found, Rendered) else found for found in rendered]

    def show(self, row: Values) -> list[Token]:
        """Return a row's tokens as text, with the role of the message that each belongs to."""
        found = self._rendered(row)
        if isinstance(found, Refused):
            raise found
        (encoding,) = tokenize(self.renderer.tokenizer, [found.text])
        encoded = self._encoded(found, encoding)
        if isinstance(encoded, Refused):
            raise encoded
        roles = [next((role for end, role in found.turns if at < end), "") for at, _ in encoding.offsets]
        return list(zip(readable(encoding, found.text), encoded[1].tolist(), roles, strict=True))

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""
        renderer = self.renderer
        said = [renderer.templates[True], renderer.templates[False], sorted(renderer.train_on), renderer.template_args]
        return _hash(tokenizer_text(renderer.tokenizer), json.dumps(said, default=str), code_of(self.conversation))

    def _rendered(self, row: Values) -> Rendered | Refused:
        try:
            found = self.renderer.render(self.conversation(row))
            for _, start, end in found.pieces:
                if control := self.special.search(found.text, start, end):
                    raise Refused(f"the text of a message holds the control token {control.group()}")
        except Refused as refused:
            return refused
        return found

    def _encoded(self, rendered: Rendered, encoding: Any) -> Encoded:
        import numpy as np

        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        mask = overlaps(offsets, rendered.spans)
        if not mask[1:].any():
            return Refused("no token of it would be supervised")
        return np.array(encoding.ids, dtype=np.uint32), mask


@attrs.define
class TextEncoder:
    """Plain documents, every token of which is supervised."""

    tokenizer: Any
    column: str
    bos: bool
    eos: bool

    def encode(self, rows: list[Values]) -> list[Encoded]:
        """Encode many rows at once."""
        import numpy as np

        texts = [row.get(self.column) for row in rows]
        good = [text for text in texts if isinstance(text, str) and text]
        encodings = iter(tokenize(self.tokenizer, good))
        found: list[Encoded] = []
        for text in texts:
            if not isinstance(text, str) or not text:
                found.append(Refused(f"the column {self.column!r} is missing, empty or not text"))
                continue
            ids = [*self._bos(), *next(encodings).ids, *self._eos()]
            mask = np.ones(len(ids), dtype=bool)
            found.append((np.array(ids, dtype=np.uint32), mask) if len(ids) > 1 else Refused("it is a single token"))
        return found

    def show(self, row: Values) -> list[Token]:
        """Return a row's tokens as text."""
        (encoded,) = self.encode([row])
        if isinstance(encoded, Refused):
            raise encoded
        return [(self.tokenizer.decode([i]), n > 0, "text") for n, i in enumerate(encoded[0].tolist())]

    def fingerprint(self) -> str:
        """Return a hash of everything that decides what a row becomes."""
        return _hash(tokenizer_text(self.tokenizer), repr([self.column, self.bos, self.eos]))

    def _bos(self) -> list[int]:
        return [self.tokenizer.bos_token_id] if self.bos else []

    def _eos(self) -> list[int]:
        return [self.tokenizer.eos_token_id] if self.eos else []


def tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Return the encodings of texts, with nothing added, cut or padded."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    try:
        return list(backend.encode_batch(texts, add_special_tokens=False))
    except (TypeError, UnicodeEncodeError):  # a lone surrogate, which no encoding can write
        safe = [text.encode("utf-8", "replace").decode() for text in texts]
        return list(backend.encode_batch(safe, add_special_tokens=False))


def overlaps(offsets: "np.ndarray", spans: list[tuple[int, int]]) -> "np.ndarray":
    """Tell which tokens share a character with a span.

    Args:
        offsets: [n, 2] start and end of each token, in characters.
        spans: starts and ends, sorted and disjoint.

    Returns:
        [n] booleans.

    >>> import numpy as np
    >>> overlaps(np.array([[0, 2], [2, 2], [2, 5], [5, 6]]), [(4, 5)]).tolist()
    [False, False, True, False]
    """
    import numpy as np

    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    first = np.searchsorted(ends, offsets[:, 0], side="right")  # the first span that ends behind the token's start
    begins = np.append(starts, np.iinfo(np.int64).max)[first]
    return np.asarray((begins < offsets[:, 1]) & (offsets[:, 0] < offsets[:, 1]))


def readable(encoding: Any, text: str) -> Iterator[str]:
    """Yield the text of each token; the bytes of a character that several tokens share go to the first of them."""
    shown = 0
    for start, end in encoding.offsets:
        yield text[max(start, shown) : end]
        shown = max(shown, end)


def tokenizer_text(tokenizer: Any) -> str:
    """Return everything that a tokenizer is made of."""
    return str(tokenizer.backend_tokenizer.to_str()) + repr(sorted(tokenizer.special_tokens_map.items()))


def code_of(function: Callable[..., Any]) -> str:
    """Return what identifies a function that a user may have written: its source where it can be had."""
    import inspect

    owner = type(getattr(function, "__self__", None))
    target = owner if hasattr(function, "__self__") else function
    try:
        return inspect.getsource(target)
    except (OSError, TypeError):
        return f"{target.__module__}.{target.__qualname__}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
