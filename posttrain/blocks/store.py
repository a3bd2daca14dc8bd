"""Tokenized rows at rest: flat memory-mapped arrays, made once per source and shared by every run that can use them.

What a row becomes depends on the source's content, the tokenizer, the template and the options of the encoder: the
cache is keyed by all of these. How long a row may be is decided afterwards, on views, and costs no tokenizing.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.encode import Encoder
from posttrain.blocks.schemas import Refused
from posttrain.blocks.sources import Source
from posttrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
BATCH = 512
EXAMPLES = 3
ARRAYS = {"ids": "uint32", "mask": "bool", "offsets": "int64", "rows": "int64", "supervised": "int32"}
"""ids, mask [tokens]; offsets [documents + 1]; rows [documents], the row of the source that each was; supervised
[documents], how many of its tokens can be predicted and are trained."""
log = logging.getLogger("posttrain")


@attrs.frozen(eq=False)
class Table:
    """The tokenized rows of one source."""

    label: str
    ids: "np.ndarray"
    mask: "np.ndarray"
    offsets: "np.ndarray"
    rows: "np.ndarray"
    supervised: "np.ndarray"
    rows_in: int
    refused: dict[str, dict[str, Any]]
    """Reason -> count, and places of the first few."""


def default_cache() -> Path:
    """Return where tokenized rows are kept: $POSTTRAIN_CACHE, or a folder in the user's cache."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain")


def table(source: Source, encoder: Encoder, cache: Path) -> Table:
    """Return the tokenized rows of a source, made now if no run has made them before.

    Several processes may ask at once: one makes them, the others wait for it.

    Raises:
        DataError: the source cannot be read, is empty, or the cache cannot be written.
    """
    from filelock import FileLock

    reader = source.open()
    key = hashlib.sha256(f"{FORMAT} {source.fingerprint(reader)} {encoder.fingerprint()}".encode()).hexdigest()[:32]
    folder = cache / key
    if is_whole(folder):  # without the lock, so that a cache that may only be read can be used
        return opened(folder, source.label)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not is_whole(folder):
                build(source, reader, encoder, folder)
    except OSError as error:
        raise DataError(
            f"the cache folder {cache} cannot be written: {error.strerror or error}; "
            "set data.cache_dir or $POSTTRAIN_CACHE"
        ) from error
    return opened(folder, source.label)


def build(source: Source, reader: Any, encoder: Encoder, folder: Path) -> None:
    """Tokenize a source into a folder: written aside, then renamed, so that a folder with this name is whole."""
    import numpy as np

    from posttrain.blocks.loader import chunks

    aside = folder.with_suffix(f".tmp-{os.getpid()}")
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale)  # whoever made it is gone: we hold the lock
    aside.mkdir()
    rows_in, total, refused = 0, 0, dict[str, dict[str, Any]]()
    log.info("tokenizing %s", source.label)
    files = {name: open(aside / name, "wb") for name in ARRAYS}  # noqa: SIM115
    try:
        files["offsets"].write(np.zeros(1, dtype="int64").tobytes())
        for batch in chunks((row for row, _ in source.read(reader)), BATCH):
            rows_in += len(batch)
            for row, found in zip(batch, encoder.encode([row.values for row in batch]), strict=True):
                if isinstance(found, Refused):
                    note(refused, str(found), row.place)
                    continue
                ids, mask = found
                total += len(ids)
                values = {"ids": ids, "mask": mask, "offsets": total, "rows": row.number, "supervised": mask[1:].sum()}
                for name, value in values.items():
                    files[name].write(np.asarray(value, dtype=ARRAYS[name]).tobytes())
            if rows_in % (100 * BATCH) == 0:
                log.info("tokenizing %s: %s rows, %s tokens", source.label, f"{rows_in:,}", f"{total:,}")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())  # after a power cut, a renamed folder must not hold holes
    except DataError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise error if source.name_or_path in str(error) else DataError(f"{source.label}: {error}") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        for file in files.values():
            file.close()
    if rows_in == 0:
        shutil.rmtree(aside)
        raise DataError(f"{source.label} holds no rows")
    sizes = {name: (aside / name).stat().st_size for name in ARRAYS}
    manifest = {"format": FORMAT, "rows_in": rows_in, "refused": refused, "bytes": sizes}
    (aside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def note(refused: dict[str, dict[str, Any]], reason: str, place: str) -> None:
    """Count a refused row, and remember where the first few are."""
    entry = refused.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += 1
    if len(entry["examples"]) < EXAMPLES:
        entry["examples"].append(place)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all that its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in manifest["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def opened(folder: Path, label: str) -> Table:
    """Map a folder's arrays into memory."""
    import numpy as np

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))

    def mapped(name: str) -> "np.ndarray":
        if not manifest["bytes"][name]:
            return np.zeros(0, dtype=ARRAYS[name])
        return np.asarray(np.memmap(folder / name, dtype=ARRAYS[name], mode="r"))

    arrays = {name: mapped(name) for name in ARRAYS}
    return Table(label=label, rows_in=manifest["rows_in"], refused=manifest["refused"], **arrays)


@attrs.frozen(eq=False)
class Documents:
    """Views of the tokenized rows of several sources: what is trained on, after rows were dropped and cut."""

    tables: list[Table]
    starts: "np.ndarray"
    """int64 [n], where each document begins in its table."""
    lengths: "np.ndarray"
    """int32 [n], in tokens."""
    source: "np.ndarray"
    """int16 [n], the number of its table."""
    supervised: "np.ndarray"
    """int32 [n], its supervised tokens."""
    weights: list[float]
    """Of each source."""

    def __len__(self) -> int:
        return len(self.starts)

    def doc(self, index: int) -> "tuple[np.ndarray, np.ndarray]":
        """Return a document's token ids and mask, [length] each, without copying them."""
        from_table = self.tables[self.source[index]]
        begin = self.starts[index]
        end = begin + self.lengths[index]
        return from_table.ids[begin:end], from_table.mask[begin:end]


@attrs.frozen
class Limits:
    """What happens to rows that are too long or unusable."""

    max_length: int
    overflow: str
    invalid: str


def documents(
    tables: list[Table], weights: list[float], limits: Limits, held_out: float, want_held_out: bool
) -> tuple[Documents, dict[str, dict[str, Any]]]:
    """Return views of the tables, and the ledger of what became of their rows, per source.

    Args:
        tables: one per source.
        weights: one per source.
        limits: the policies.
        held_out: share of the rows that belong to evaluation.
        want_held_out: whether to return these or the others.

    Raises:
        DataError: rows are unusable or too long, and the policy is `error`.
    """
    import numpy as np

    refuse_invalid(tables, limits)
    parts, ledger = [], dict[str, dict[str, Any]]()
    for number, from_table in enumerate(tables):
        chosen = np.flatnonzero(is_held_out(from_table.rows, held_out) == want_held_out)
        starts, lengths, supervised, counts = cut(from_table, chosen, limits)
        name = from_table.label if from_table.label not in ledger else f"{from_table.label} #{number + 1}"
        refused = {reason: found["count"] for reason, found in from_table.refused.items()} if not want_held_out else {}
        ledger[name] = {
            "rows_in": len(chosen) + sum(refused.values()),
            "tokens_in": int(np.diff(from_table.offsets)[chosen].sum()),
            "dropped": refused | counts.pop("dropped"),
            **counts,
            "documents": len(starts),
            "tokens": int(lengths.sum()),
            "supervised_tokens": int(supervised.sum()),
        }
        parts.append((starts, lengths, np.full(len(starts), number, dtype=np.int16), supervised))
    refuse_overlong(ledger, limits)
    starts, lengths, source, supervised = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not len(starts):
        raise DataError(
            "nothing is left to train on:\n" + "\n".join(f"  {name}: {found}" for name, found in ledger.items())
        )
    return Documents(tables, starts, lengths.astype(np.int32), source, supervised, weights), ledger


def is_held_out(rows: "np.ndarray", share: float) -> "np.ndarray":
    """Tell which rows of a source belong to evaluation: a fixed, evenly spread choice that no seed changes."""
    import numpy as np

    return np.asarray((rows.astype(np.uint64) * np.uint64(2654435769)) % np.uint64(2**32) < share * 2**32)


def cut(
    from_table: Table, chosen: "np.ndarray", limits: Limits
) -> tuple["np.ndarray", "np.ndarray", "np.ndarray", dict[str, Any]]:
    """Apply the overflow policy: return starts, lengths and supervised counts of what is left, and what was done."""
    import numpy as np

    starts, supervised = from_table.offsets[:-1][chosen], from_table.supervised[chosen]
    lengths = np.diff(from_table.offsets)[chosen]
    long = lengths > limits.max_length
    counts: dict[str, Any] = {"dropped": {}, "too_long": int(long.sum()), "longest": int(lengths.max(initial=0))}
    if not long.any():
        return starts, lengths, supervised, counts
    pieces: list[tuple[int, int]] = []
    if limits.overflow == "drop":
        counts["dropped"][f"longer than {limits.max_length} tokens"] = counts["too_long"]
    elif limits.overflow in ("truncate", "split"):
        step = limits.max_length
        for start, length in zip(starts[long].tolist(), lengths[long].tolist(), strict=True):
            ends = [step] if limits.overflow == "truncate" else range(step, length + step, step)
            pieces += [(start + end - step, min(end, length) - end + step) for end in ends]
    trained = [int(from_table.mask[start + 1 : start + length].sum()) for start, length in pieces]
    useful = [(start, length, count) for (start, length), count in zip(pieces, trained, strict=True) if count]
    if len(useful) < len(pieces):
        counts["dropped"]["cut pieces without a supervised token"] = len(pieces) - len(useful)
    counts["tokens_cut"] = int(lengths[long].sum()) - sum(length for _, length, _ in useful)
    new = np.array(useful, dtype=np.int64).reshape(-1, 3).T
    kept = (starts[~long], lengths[~long], supervised[~long])
    return *(np.concatenate([old, more]) for old, more in zip(kept, new, strict=True)), counts  # type: ignore[return-value]


def refuse_invalid(tables: Iterable[Table], limits: Limits) -> None:
    """Raise if rows cannot be trained on and the policy is to say so."""
    lines = [
        f"  {found['count']:,} x {reason} (such as {', '.join(found['examples'])})"
        for from_table in tables
        for reason, found in from_table.refused.items()
    ]
    if lines and limits.invalid == "error":
        raise DataError(
            "some rows cannot be trained on:\n"
            + "\n".join(lines)
            + "\nmend them, or leave them out with data.invalid=drop"
        )


def refuse_overlong(ledger: dict[str, dict[str, Any]], limits: Limits) -> None:
    """Raise if rows are too long and the policy is to say so."""
    lines = [
        f"  {name}: {found['too_long']:,} of {found['rows_in']:,} rows are longer than {limits.max_length:,} tokens "
        f"(the longest has {found['longest']:,})"
        for name, found in ledger.items()
        if found["too_long"]
    ]
    if lines and limits.overflow == "error":
        raise DataError(
            "some rows are too long:\n" + "\n".join(lines) + "\nset data.overflow to drop, truncate or split, "
            "or raise data.max_length"
        )


def totals(ledger: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a ledger's sums over sources."""
    sums: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for found in ledger.values():
        sums.update({name: value for name, value in found.items() if isinstance(value, int) and name != "longest"})
        dropped.update(found["dropped"])
    return {**sums, "dropped": dict(dropped)}
