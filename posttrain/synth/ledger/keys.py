"""What makes a request the same request: its content. And API keys, which must never be written or printed."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from posttrain.errors import SynthError
from posttrain.values import Secret

CHAT = "/chat/completions"
BYTES_PER_TOKEN = 4
"""For estimates only; about right for English text in the tokenizers of today."""
UNBOUNDED_OUTPUT = 1024
"""Tokens reserved for a reply whose body sets no maximum."""


LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Keys of a body that bound its reply."""
IMAGE_TOKENS = 1500
"""About the most that one image costs with today's providers; its bytes say nothing about that."""


class Request(NamedTuple):
    """One request of the ledger."""

    id: int
    key: bytes
    endpoint: str
    """Path below the base URL, such as `/chat/completions`."""
    model: str
    body: bytes
    """Canonical JSON."""
    tokens: int
    """Estimated tokens of the prompt."""
    reserve: int
    """Tokens that the reply may have."""

    @property
    def custom_id(self) -> str:
        """The name of this request in batch files: 32 hexadecimal digits."""
        return self.key.hex()[:32]


def canonical(value: Any) -> bytes:
    """Return compact JSON in UTF-8. Keys keep their order: models fill a JSON schema in the order of its properties,
    so that two orders are two requests.

    Raises:
        SynthError: the value cannot be JSON (NaN, a tensor, a set).

    >>> canonical({"b": 1, "a": "ä"})
    b'{"b":1,"a":"\\xc3\\xa4"}'
    """
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
        raise SynthError(f"a request must be plain JSON data: {error}") from None


def in_order(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body with its own keys in one order, whatever order they were given in; what they hold stays.

    >>> list(in_order({"top_p": 1, "messages": [], "max_tokens": 5, "model": "m"}))
    ['model', 'messages', 'max_tokens', 'top_p']
    """
    first = [name for name in ("model", "messages") if name in body]
    return {name: body[name] for name in (*first, *sorted(body.keys() - set(first)))}


def content_hash(namespace: str, endpoint: str, body: bytes) -> bytes:
    """Return what all samples of one request share; `namespace` says whose model names are meant."""
    return hashlib.sha256(b"\0".join((namespace.encode(), endpoint.encode(), body))).digest()


def sample_key(content: bytes, sample: int) -> bytes:
    """Return the key of the n-th request with this content, counted from 0 within a task."""
    return hashlib.sha256(content + sample.to_bytes(8, "big")).digest()


def estimates(body: dict[str, Any], size: int) -> tuple[int, int]:
    """Return (estimated prompt tokens, tokens that the replies may have) of a body of so many bytes."""
    limit = next((body[k] for k in LIMITS if body.get(k)), None)
    count = body.get("n") or 1
    images, encoded = pictures(body)
    tokens = max(1, (size - encoded) // BYTES_PER_TOKEN) + images * IMAGE_TOKENS
    return tokens, int(limit or UNBOUNDED_OUTPUT) * int(count)


def pictures(body: dict[str, Any]) -> tuple[int, int]:
    """Return (how many images a body holds, how many bytes of it are their data)."""
    count = encoded = 0
    for message in body.get("messages") or ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in ("image_url", "input_image", "image"):
                count += 1
                encoded += len(json.dumps(part))
    return count, encoded


class Given(Secret):
    """A secret given as text from Python. It lives in a closure: not in `vars()`, not in a repr, not in a pickle.

    >>> Given("sk-1")
    Given('...')
    """

    def __init__(self, value: str) -> None:
        super().__init__("given from Python")
        self.reveal = lambda: value  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return "Given('...')"

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the key behind: a pickle may end up in a file."""
        return LeftBehind, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and other.reveal() == self.reveal()

    def __hash__(self) -> int:
        return hash(self.reveal())


class LeftBehind(Secret):
    """A key given as text that did not come along into another process."""

    def __init__(self) -> None:
        super().__init__("given from Python in another process")

    def reveal(self) -> str:
        """Say what to do.

        Raises:
            SynthError: always.
        """
        raise SynthError(
            "a key that was given as text stays in its process: put it into the environment (OPENAI_API_KEY, ...), "
            "where other processes find it, and leave api_key out"
        )


def as_secret(value: "str | Secret | None") -> Secret | None:
    """Hide a key that was given as text."""
    return Given(value) if isinstance(value, str) else value


class Scrubber:
    """Takes secrets out of messages; servers do repeat keys in their errors. Replies are data and stay as they are."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def learn(self, secret: str) -> str:
        """Take note of a secret, and return it."""
        if len(secret) >= 6:  # anything shorter would also hit harmless text
            self._known.add(secret)
        return secret

    def key(self, secret: Secret) -> str:
        """Return a key as a header can hold it: without the line break that a file or a mounted secret ends with.

        Raises:
            SynthError: it is empty, or holds what no header can; the message does not show it.
        """
        value = self.learn(secret.reveal().strip())
        if not value:
            raise SynthError(f"the API key {secret!r} is empty")
        wrong = next((i for i, letter in enumerate(value) if not "!" <= letter <= "~"), None)
        if wrong is not None:
            what = "a blank or a line break" if value[wrong].isspace() else "a character that no HTTP header can hold"
            raise SynthError(
                f"the API key {secret!r} has {what} as character {wrong + 1} of {len(value)}: was it copied whole, "
                "and is it the only thing in its variable or file?"
            )
        return value

    def text(self, message: str) -> str:
        """Return a message of one line without any secret, shortened to what a person reads."""
        readable = self.lines(message).encode("utf-8", "replace").decode("utf-8")
        flat = re.sub(r"\s+", " ", readable).strip()
        return flat if len(flat) <= 400 else flat[:397] + "..."

    def lines(self, message: str) -> str:
        """Return a message of any length without any secret, its lines as they are."""
        for secret in sorted(self._known, key=len, reverse=True):
            message = message.replace(secret, "[secret]")
        return message

    def __repr__(self) -> str:
        return f"Scrubber({len(self._known)} secrets)"


@contextmanager
def scrubbed(scrubber: Scrubber) -> Iterator[None]:
    """Take secrets out of an error's message on its way out."""
    try:
        yield
    except SynthError as error:
        error.args = tuple(scrubber.lines(part) if isinstance(part, str) else part for part in error.args)
        raise


def counted(words: Iterable[tuple[str, int]]) -> str:
    """Return "3 timeout, 1 http_500" of (word, how many)."""
    return ", ".join(f"{number:,} {word}" for word, number in words)
