"""Texts -> encodings, and which of their tokens lie where in a text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Return the encodings of texts, with nothing added, cut or padded."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return list(backend.encode_batch(texts, add_special_tokens=False))


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
        first = token_at(encoding, range(start, end))
        last = token_at(encoding, range(end - 1, start - 1, -1))
        if first is None or last is None:
            continue
        while last + 1 < len(mask) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1  # more bytes of the span's last character
        mask[first : last + 1] = True
    return mask


def token_at(encoding: Any, characters: range) -> int | None:
    """Return the token of the first of these characters that has one: a normalizer may have dropped some."""
    return next((token for c in characters if (token := encoding.char_to_token(c)) is not None), None)
