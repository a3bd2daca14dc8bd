"""Dedup: of rows that say the same, or nearly the same, the first one stays.

Near duplicates are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3), in numpy. What hashing brings together is then compared exactly, so that
nothing is dropped that is less similar than the threshold.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs.validators import and_, gt, le

from posttrain.blocks.data.rows.schemas import CHATS, REPLIES, SYSTEM
from posttrain.blocks.data.sources import Source
from posttrain.errors import DataError
from posttrain.registry import block, key
from posttrain.synth.pipelines.rows import Drop, Row, column, texts
from posttrain.synth.pipelines.step import Step

if TYPE_CHECKING:
    import numpy as np

ALONE = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
"""Letters of scripts that put no blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+")
TOKEN = re.compile(rf"\d+(?:[.,]\d+)+|[^\W{ALONE}]+|[{ALONE}]|[^\w\s]")
ENDS = re.compile(
    r"(?:[.,;:?\u2026](?<=\w.)|!(?<=[^\W\d].))[.,;:!?\u2026]*(?=\s|$)|[\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a]"
)
"""Punctuation that ends a clause. Any other sign can be what a text is about: `C++`, `3-4`, `a<b`, an emoji."""
SAID = {*CHATS, *REPLIES, *(name for names in REPLIES.values() for name in names), *SYSTEM}
"""Columns in which the known schemas keep what is asked and answered."""
CHUNK = 256
"""Rows that are hashed together."""


@block("step", "dedup")
class Dedup(Step):
    """Drop rows that say what an earlier one has said."""

    columns: list[str] = attrs.field(factory=list)
    """What is compared, all of it together; of conversations, the contents of the messages count. Unless given: what
    a row asks and what it answers (`prompt` and `response`, `messages`, ...), since "4" answers many questions."""
    method: Literal["minhash", "exact"] = "minhash"
    """`exact`: the same words and signs, whatever the case, the white space and the punctuation at the end of clauses.
    `minhash`: nearly the same, too."""
    threshold: float = key(0.7, check=and_(gt(0), le(1)))
    """Jaccard similarity of the n-grams from which on two rows are duplicates."""
    ngram: int = key(3, check=gt(0))
    """Words and signs of an n-gram; in Chinese, Japanese and Thai, characters. A text with fewer is one n-gram."""
    permutations: int = key(128, check=gt(0))
    """Hash functions; more find near duplicates more surely, and take longer."""
    against: list[Source] = attrs.field(factory=list)
    """Rows that count as said already, such as the seeds that these were made from."""

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return the rows of which there is no earlier duplicate."""
        seen = Exact() if self.method == "exact" else MinHash(self.threshold, self.ngram, self.permutations)
        known = (row.values for source in self.against for row, _ in source.read(source.open()))
        for _ in seen.among(known, self.text):
            pass
        for row, found in seen.among(rows, self.text):
            if found is None:
                yield row
            else:
                what = "a duplicate" if found.similarity == 1 else "nearly a duplicate"
                yield Drop(row, f"{what} of an earlier row", found.text[:500])

    def text(self, row: Row) -> str:
        """Return what of a row is compared.

        Raises:
            DataError: it lacks a column.
        """
        names = self.columns or [name for name in row if name in SAID]
        if not names:
            raise DataError(
                f"dedup knows none of the columns {', '.join(row)} as what a row says: name them, `columns: [...]`"
            )
        return "\n\u00b6\n".join(text for name in names for text in texts(column(row, name)))


@attrs.frozen
class Found:
    """An earlier text that a text repeats."""

    text: str
    similarity: float


class Exact:
    """Texts whose words are the same."""

    def __init__(self) -> None:
        self.texts: dict[bytes, str] = {}

    def among(self, rows: Iterable[Any], text_of: Any) -> Iterator[tuple[Any, Found | None]]:
        """Yield each row with the first text that says the same, if there is one; otherwise remember it."""
        for row in rows:
            text = text_of(row)
            digest = hashlib.blake2b(" ".join(tokens(text)).encode(), digest_size=16).digest()
            first = self.texts.get(digest)
            self.texts.setdefault(digest, text)
            yield row, None if first is None else Found(first, 1.0)


class MinHash:
    """Texts whose word n-grams overlap."""

    def __init__(self, threshold: float, ngram: int, permutations: int) -> None:
        import numpy as np

        self.threshold, self.ngram = threshold, ngram
        self.bands, self.width = bands(threshold, permutations)
        random = np.random.default_rng(1)
        size = self.bands * self.width
        self.factors = random.integers(0, 2**63, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.offsets = random.integers(0, 2**63, size, dtype=np.uint64)
        self.mixers = random.integers(0, 2**63, ngram, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.buckets: list[dict[bytes, list[int]]] = [{} for _ in range(self.bands)]
        self.kept: list[tuple[str, np.ndarray]] = []
        """Text and sorted n-gram hashes of each first one."""
        self.hashes: dict[str, int] = {}

    def among(self, rows: Iterable[Any], text_of: Any) -> Iterator[tuple[Any, Found | None]]:
        """Yield each row with the most similar earlier text, if it passes the threshold; otherwise remember it."""
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            said = [text_of(row) for row in chunk]
            grams = [self.grams(text) for text in said]
            for row, text, gram, signature in zip(chunk, said, grams, self.signatures(grams), strict=True):
                yield row, self.find_or_add(text, gram, signature)

    def find_or_add(self, text: str, grams: "np.ndarray", signature: "np.ndarray") -> Found | None:
        """Return the most similar earlier text; if there is none, remember this one."""
        step = self.width * signature.itemsize
        raw = signature.tobytes()
        names = [raw[start : start + step] for start in range(0, len(raw), step)]
        candidates = {i for bucket, name in zip(self.buckets, names, strict=True) for i in bucket.get(name, ())}
        best = max(((jaccard(grams, self.kept[i][1]), -i) for i in candidates), default=(0.0, 0))
        if best[0] >= self.threshold:
            return Found(self.kept[-best[1]][0], best[0])
        for bucket, name in zip(self.buckets, names, strict=True):
            bucket.setdefault(name, []).append(len(self.kept))
        self.kept.append((text, grams))
        return None

    def grams(self, text: str) -> "np.ndarray":
        """Return the hashes of a text's different n-grams, sorted, [n-grams] uint64."""
        import numpy as np

        found, known = tokens(text), self.hashes
        for word in found:
            if word not in known:
                known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        each = np.fromiter((known[word] for word in found), np.uint64, len(found))
        if len(each) < self.ngram:
            each = np.concatenate([each, np.zeros(self.ngram - len(each), np.uint64)])
        count = len(each) - self.ngram + 1
        sums = each[:count] * self.mixers[0]
        for i in range(1, self.ngram):
            sums = (sums ^ (sums >> np.uint64(29))) * self.mixers[i] + each[i : i + count]
        return np.unique(sums * self.mixers[0])

    def signatures(self, grams: "list[np.ndarray]") -> "np.ndarray":
        """Return the smallest value of each hash function over each text's n-grams, [texts, functions] uint32."""
        import numpy as np

        starts = np.cumsum([0, *(len(gram) for gram in grams[:-1])])
        whole = np.concatenate(grams)
        made = np.empty((len(self.factors), len(grams)), np.uint32)
        for i, (factor, offset) in enumerate(zip(self.factors, self.offsets, strict=True)):
            made[i] = np.minimum.reduceat(((whole * factor + offset) >> np.uint64(32)).astype(np.uint32), starts)
        return np.ascontiguousarray(made.T)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation.

    >>> words("Don't say 你好!")
    ['don', 't', 'say', '你', '好']
    """
    return WORD.findall(text.lower())


def tokens(text: str) -> list[str]:
    """Return the words and signs of a text in lower case, without the punctuation that ends clauses.

    >>> tokens("Is C++ so good? x = -3.5, he said.")
    ['is', 'c', '+', '+', 'so', 'good', 'x', '=', '-', '3.5', 'he', 'said']
    """
    return TOKEN.findall(ENDS.sub(" ", unicodedata.normalize("NFC", text)).lower())


def jaccard(a: "np.ndarray", b: "np.ndarray") -> float:
    """Return the similarity of two sets: what they share, over all that is in them."""
    import numpy as np

    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def bands(threshold: float, permutations: int, recall: float = 0.995) -> tuple[int, int]:
    """Return (bands, hash functions of each): the widest bands that still bring together two texts of a similarity
    just at the threshold with the probability `recall`; the wider, the fewer are compared for nothing."""
    for width in range(permutations, 0, -1):
        count = permutations // width
        if 1 - (1 - threshold**width) ** count >= recall:
            return count, width
    return permutations, 1
