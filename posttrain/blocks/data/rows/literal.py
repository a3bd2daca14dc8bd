"""Text in which some control tokens are meant literally: a user may write `<image>`, and means no image.

The text is tokenized in parts: the control tokens that the template itself has written, and what lies between them,
where nothing counts as one. That is what a tokenizer does by itself, which splits at its control tokens first.
"""

from collections.abc import Iterable
from typing import Any

import attrs

Span = tuple[int, int]


@attrs.frozen(eq=False)
class Parts:
    """The encodings of the parts of a text, as one encoding of the `tokenizers` library is read."""

    encodings: list[tuple[Any, int]]
    """Each with the character that it begins at."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        return [token for encoding, _ in self.encodings for token in encoding.ids]

    @property
    def offsets(self) -> list[Span]:
        """Begin and end of each token, in characters."""
        return [(a + at, b + at) for encoding, at in self.encodings for a, b in encoding.offsets]

    def __len__(self) -> int:
        return sum(len(encoding) for encoding, _ in self.encodings)

    def char_to_token(self, character: int) -> int | None:
        """Return the token of a character."""
        before = 0
        for n, (encoding, at) in enumerate(self.encodings):
            last = n + 1 == len(self.encodings)
            if at <= character and (last or character < self.encodings[n + 1][1]):
                token = encoding.char_to_token(character - at)
                return None if token is None else before + int(token)
            before += len(encoding)
        return None

    def token_to_chars(self, token: int) -> Span:
        """Return begin and end of a token."""
        return self.offsets[token]


class Literal:
    """Tokenizes text in which only given places are control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self.plain = tokenizer.backend_tokenizer
        self.literal = Tokenizer.from_str(self.plain.to_str())
        self.literal.encode_special_tokens = True
        control = next((str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special), "")
        sample = f"one {control}two, {control} three{control}\n\nfour"
        own = [(at, at + len(control)) for at in range(len(sample)) if control and sample.startswith(control, at)]
        whole = self.plain.encode(sample, add_special_tokens=False)
        self.works = self.encode(sample, own).ids == list(whole.ids)
        """Whether parts are tokenized as the whole is; not where a tokenizer puts a space in front of a text."""

    def encode(self, text: str, controls: Iterable[Span]) -> Parts:
        """Return the encoding of a text in which only the given places are control tokens."""
        found, at = [], 0
        for start, end in [*controls, (len(text), len(text))]:
            if at < start:
                found.append((self.literal.encode(text[at:start], add_special_tokens=False), at))
            if start < end:
                found.append((self.plain.encode(text[start:end], add_special_tokens=False), start))
            at = end
        return Parts(found)
