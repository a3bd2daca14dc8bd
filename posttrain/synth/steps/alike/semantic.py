"""Semantic: of rows that mean the same, the first one stays; and a map of what the rows cover.

Deduplication by embeddings as in SemDeDup (arXiv:2303.09540), without its clusters: each row is compared with all that
stay. Diversity is the Vendi score (arXiv:2210.02410): the number of different rows that a set is worth.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import and_, gt, le

from posttrain.errors import SynthError
from posttrain.registry import block, key
from posttrain.synth.pipelines.rows import Chat, Drop, Reply, Row
from posttrain.synth.pipelines.step import Asking
from posttrain.synth.steps.alike.dedup import Dedup

if TYPE_CHECKING:
    import numpy as np

EMBEDDINGS = "/embeddings"
VECTOR = "\0embedding"
"""Between `fold` and `table` only."""
CHUNK = 256
PLACE = "place"
"""Column of where a row is on the map."""


@block("step", "semantic")
class Semantic(Asking):
    """Drop rows that mean what an earlier one means, by embeddings of a server's `/embeddings`, or of a model in this
    process: `client: {type: transformers, name_or_path: BAAI/bge-small-en-v1.5}`.

    All rows are held in memory. Each gets `similarity` (to the nearest row that stays before it) and `place` (where it
    is on the map that `posttrain synth view` draws: the two directions in which the rows differ most).
    """

    columns: list[str] = attrs.field(factory=list)
    """What is compared; what a row asks and answers unless given, as in `dedup`."""
    threshold: float = key(0.95, check=and_(gt(0), le(1)))
    """Cosine from which on two rows mean the same. It depends on the model: look at pairs near it first."""
    longest: int = key(8000, check=gt(0))
    """Characters of a row that are embedded; models take no more than some thousand tokens."""

    def text(self, row: Row) -> str:
        """Return what of a row is compared."""
        return Dedup(columns=self.columns).text(row)[: self.longest]

    def chats(self, row: Row) -> list[Chat]:
        """Return one request for the embedding of the row."""
        return [Chat([], self.model, {"input": self.text(row), **self.body}, EMBEDDINGS)]

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the row with its embedding, which `table` takes out again."""
        (reply,) = replies
        if reply.body is None:
            return [Drop(row, reply.trouble, str((reply.error or {}).get("message") or ""))]
        vector = vector_in(reply.body)
        return [Drop(row, "the reply holds no embedding")] if vector is None else [{**row, VECTOR: vector}]

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return the rows of which no earlier one means the same, each with its place."""
        import numpy as np

        held: list[Row] = []
        vectors: list[np.ndarray] = []
        for row in rows:
            vectors.append(np.asarray(row[VECTOR], np.float32))
            held.append({name: value for name, value in row.items() if name != VECTOR})
        if not held:
            return
        if len({len(vector) for vector in vectors}) > 1:
            raise SynthError("the embeddings of the rows differ in length: two models have answered")
        units = unit(np.stack(vectors))
        places, kept = placed(units), Kept(units)
        for number, row in enumerate(held):
            similarity, nearest = kept.nearest(number)
            made = {**row, PLACE: places[number], "similarity": round(similarity, 4)}
            if similarity >= self.threshold:
                yield Drop(made, "means the same as an earlier row", self.text(held[nearest])[:500])
            else:
                kept.add(number)
                yield made
        self._measured["diversity (Vendi)"] = vendi(units[kept.numbers])

    @cached_property
    def _measured(self) -> dict[str, str | float]:
        return {}

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return how different the rows are that stay."""
        found = [float(row["similarity"]) for row in rows]
        return {"mean similarity to an earlier row": sum(found) / len(found), **self._measured} if found else {}


class Kept:
    """The rows that stay, to compare others with."""

    def __init__(self, units: "np.ndarray") -> None:
        self.units = units
        self.numbers: list[int] = []
        self._matrix = units[:0]

    def nearest(self, number: int) -> tuple[float, int]:
        """Return (cosine, number) of the row that stays and is most like another one; (0, -1) if none stays yet."""
        if not self.numbers:
            return 0.0, -1
        found = self._matrix[: len(self.numbers)] @ self.units[number]
        best = int(found.argmax())
        return float(found[best]), self.numbers[best]

    def add(self, number: int) -> None:
        """Take in a row that stays."""
        import numpy as np

        if len(self.numbers) == len(self._matrix):  # room for twice as many
            grown = np.zeros((max(CHUNK, 2 * len(self._matrix)), self.units.shape[1]), np.float32)
            grown[: len(self._matrix)] = self._matrix
            self._matrix = grown
        self._matrix[len(self.numbers)] = self.units[number]
        self.numbers.append(number)


def unit(vectors: "np.ndarray") -> "np.ndarray":
    """Return vectors of length 1, [rows, dimensions]; one of length 0 stays as it is."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    made: np.ndarray = vectors / np.where(lengths == 0, 1, lengths)
    return made


def placed(units: "np.ndarray") -> list[list[float]]:
    """Return where each row is on a map: along its first two principal components, the larger side of each positive."""
    import numpy as np

    centred = units - units.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    chosen = axes[:, ::-1][:, :2]
    chosen = chosen * np.where(chosen[np.abs(chosen).argmax(0), range(chosen.shape[1])] < 0, -1, 1)
    found = centred @ chosen
    if found.shape[1] < 2:
        found = np.concatenate([found, np.zeros((len(found), 2 - found.shape[1]))], axis=1)
    return [[round(float(x), 4), round(float(y), 4)] for x, y in found]


def vendi(units: "np.ndarray") -> float:
    """Return the Vendi score of vectors of length 1: the exponential of the entropy of the eigenvalues of their
    similarities over their number; 1 if all are the same, their number if no two have anything in common."""
    import numpy as np

    if not len(units):
        return 0.0
    small = units.T @ units if units.shape[1] < len(units) else units @ units.T  # the same eigenvalues but zeros
    values = np.linalg.eigvalsh(small.astype(np.float64) / len(units))
    values = values[values > 1e-12]
    return math.exp(float(-(values * np.log(values)).sum()))


def vector_in(body: dict[str, Any]) -> list[float] | None:
    """Return the embedding of a reply of `/embeddings`."""
    try:
        (entry,) = body["data"]
        found = [float(number) for number in entry["embedding"]]
        return found if found and all(map(math.isfinite, found)) else None
    except (KeyError, TypeError, ValueError):
        return None
