"""Tokenized rows at rest: flat memory-mapped arrays, made once per source and shared by every run that can use them.

What a row becomes depends on the source's content, the tokenizer, the template and the options of the encoder: the
cache is keyed by all of these. How long a row may be is decided afterwards (see views.py), and costs no tokenizing.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.blocks.data.encoding.encoders import Encoder, apart
from posttrain.blocks.data.encoding.processes import encoded
from posttrain.blocks.data.packing import chunks
from posttrain.blocks.data.rows.schemas import Refused
from posttrain.blocks.data.sources import Source
from posttrain.blocks.layout import Column, Columns, Example, inside
from posttrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 4
BATCH = 512
EXAMPLES = 3
EVERY = 5.0
"""Seconds between two lines about the progress."""
NOTHING = b"[]"
"""What an empty list is at rest."""
ARRAYS = {
    "ids": "uint32", "mask": "bool", "offsets": "int64", "supervised": "int32", "rows": "int64",
}  # fmt: skip
"""ids, mask [tokens]; offsets [documents + 1]; supervised [documents], how many tokens of each can be predicted and are
trained; rows [examples], the row of the source that each was. Beside them lies a file for each column of examples."""
log = logging.getLogger("posttrain")


@attrs.frozen(eq=False)
class Table:
    """The tokenized rows of one source."""

    label: str
    sides: tuple[str, ...]
    """Names of the documents of an example."""
    ids: "np.ndarray"
    mask: "np.ndarray"
    offsets: "np.ndarray"
    supervised: "np.ndarray"
    rows: "np.ndarray"
    rows_in: int
    refused: dict[str, dict[str, Any]]
    """Reason -> count, and places of the first few."""
    reading: dict[str, Any]
    """Which columns of the source were read, as what, and which were not."""
    columns: Columns
    values: dict[str, Any]
    """Of each column: [tokens, ...], [documents, ...] or [examples, ...]; of plain data, what reads them."""
    source: Source
    """Where the rows can be read again."""

    def __getitem__(self, index: int) -> Example:
        """Return an example as it was tokenized."""
        bounds = self.offsets[index * len(self.sides) : (index + 1) * len(self.sides) + 1]
        return self.view(index, bounds[:-1], bounds[1:])

    def view(self, index: int, begins: "np.ndarray", ends: "np.ndarray") -> Example:
        """Return an example whose documents lie between the given tokens, without copying them."""
        parts = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
        values = {name: self._value(name, column, index, parts) for name, column in self.columns.items()}
        return Example(tuple((self.ids[part], self.mask[part]) for part in parts), values)

    def _value(self, name: str, column: Column, index: int, parts: list[slice]) -> Any:
        held = self.values[name]
        if column.per in ("token", "target"):
            return tuple(held[part] for part in parts)
        if column.per == "span":
            first = index * len(self.sides)
            return tuple(self._spans(held[n], part, int(self.offsets[n])) for n, part in enumerate(parts, first))
        if column.per == "document":
            return tuple(held[index * len(self.sides) : (index + 1) * len(self.sides)])
        return held[index]

    def _spans(self, spans: list[dict[str, Any]], part: slice, begin: int) -> list[dict[str, Any]]:
        """Return the spans in a part of the table's tokens, of the document that begins there."""
        found = inside(spans, slice(part.start - begin, part.stop - begin))
        return [span | {"source": self.source} if "at_row" in span else span for span in found]


@attrs.frozen(eq=False)
class Texts:
    """Plain data at rest, as JSON texts end to end."""

    content: "np.ndarray"
    """uint8."""
    offsets: "np.ndarray"
    """int64 [n + 1]."""

    def __getitem__(self, index: int) -> Any:
        """Return one of them."""
        found = self.content[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return [] if found == NOTHING else json.loads(found)

    @property
    def filled(self) -> "np.ndarray":
        """int64 [k], the numbers of those that hold more than an empty list."""
        import numpy as np

        return np.flatnonzero(np.diff(self.offsets) > len(NOTHING))


def table(source: Source, encoder: Encoder, cache: Path, processes: int | None = None) -> Table:
    """Return the tokenized rows of a source, made now if no run has made them before.

    Several processes may ask at once: one makes them, the others wait for it. That one encodes in as many `processes`
    as are given, by default in one a core if there is much to encode.

    Raises:
        DataError: the source cannot be read, is empty, or the cache cannot be written.
    """
    from filelock import FileLock

    reader = source.open()
    content = source.fingerprint(reader, cache / "hashes")
    said = f"{FORMAT} {content} {encoder.fingerprint()}"
    if any(column.per == "span" for column in encoder.columns.values()):
        said += str(source.folder.absolute())  # relative paths of images begin there
    if encoder.columns:
        said += json.dumps({name: attrs.astuple(column) for name, column in encoder.columns.items()})
    key = hashlib.sha256(said.encode()).hexdigest()[:32]
    folder = cache / key
    if is_whole(folder) and not is_stale(found := opened(folder, source)):
        return found  # without the lock, so that a cache that may only be read can be used
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not is_whole(folder) or is_stale(opened(folder, source)):
                build(source, reader, encoder, folder, processes)
    except OSError as error:
        raise DataError(
            f"the cache folder {cache} cannot be written: {error.strerror or error}; "
            "set data.cache_dir or $POSTTRAIN_CACHE"
        ) from error
    return opened(folder, source)


def build(source: Source, reader: Any, encoder: Encoder, folder: Path, processes: int | None) -> None:
    """Tokenize a source into a folder: written aside, then renamed, so that a folder with this name is whole."""
    import numpy as np

    aside = folder.with_suffix(f".tmp-{os.getpid()}")
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale)  # whoever made it is gone: we hold the lock
    aside.mkdir()
    rows_in, total, refused = 0, 0, dict[str, dict[str, Any]]()
    log.info("tokenizing %s", source.label)
    said = began = time.monotonic()
    kinds = ARRAYS | column_arrays(encoder.columns)
    files = {name: open(aside / name, "wb") for name in kinds}  # noqa: SIM115
    try:
        for name in (name for name in kinds if name.endswith("offsets")):
            files[name].write(np.zeros(1, dtype="int64").tobytes())
        batches = chunks((row for row, _ in source.read(reader)), BATCH)
        for batch, became in encoded(encoder, iter(batches), processes):
            rows_in += len(batch)
            for row, found in zip(batch, became, strict=True):
                if isinstance(found, Refused):
                    note(refused, str(found), f"{row.place}: {found.detail}" if found.detail else row.place)
                    continue
                for one in apart(found, encoder.sides, encoder.columns):
                    for ids, mask in one.documents:
                        total += len(ids)
                        write(files, {"ids": ids, "mask": mask, "offsets": total, "supervised": mask[1:].sum()})
                    write(files, {"rows": row.number})
                    write_values(files, one, encoder.columns)
            if (now := time.monotonic()) - said > EVERY:
                said, rate = now, total / (now - began)
                log.info(
                    "tokenizing %s: %s rows, %s tokens, %s tokens/s",
                    source.label, *(f"{count:,.0f}" for count in (rows_in, total, rate)),
                )  # fmt: skip
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
    sizes = {name: (aside / name).stat().st_size for name in kinds}
    manifest = {
        "format": FORMAT, "sides": encoder.sides, "rows_in": rows_in, "refused": refused, "bytes": sizes,
        "reading": encoder.reading.summary(),
        "columns": {name: attrs.asdict(column) for name, column in encoder.columns.items()},
    }  # fmt: skip
    (aside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def write(files: dict[str, Any], values: dict[str, Any]) -> None:
    """Append values to the arrays of a table."""
    import numpy as np

    for name, value in values.items():
        files[name].write(np.asarray(value, dtype=ARRAYS[name]).tobytes())


def column_arrays(columns: Columns) -> dict[str, str]:
    """Return the arrays that columns are kept in: file -> type; plain data take two, the texts and their bounds."""
    texts = {name for name, column in columns.items() if column.dtype == "json"}
    kinds = {f"column-{name}": "uint8" if name in texts else column.dtype for name, column in columns.items()}
    return kinds | {f"column-{name}-offsets": "int64" for name in texts}


def write_values(files: dict[str, Any], example: Example, columns: Columns) -> None:
    """Append the values that an example carries."""
    import numpy as np

    for name, column in columns.items():
        value, file = example.values[name], files[f"column-{name}"]
        if column.dtype == "json":
            for one in value if column.per == "span" else (value,):
                file.write(json.dumps(one).encode())
                files[f"column-{name}-offsets"].write(np.asarray(file.tell(), dtype="int64").tobytes())
        else:
            for one in (value,) if column.per == "example" else value:
                file.write(np.asarray(one, dtype=column.dtype).tobytes())


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


def is_stale(found: Table) -> bool:
    """Whether a file that a span names, such as an image, has gone or has changed since."""
    for name, column in found.columns.items():
        for index in found.values[name].filled.tolist() if column.per == "span" else ():
            for span in found.values[name][index]:
                if "state" not in span:
                    continue
                try:
                    state = Path(span["path"]).stat()
                except OSError:
                    return True
                if [state.st_size, state.st_mtime_ns] != span["state"]:
                    return True
    return False


def opened(folder: Path, source: Source) -> Table:
    """Map a folder's arrays into memory."""
    import numpy as np

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))

    columns = {name: Column(**{**said, "shape": tuple(said["shape"])}) for name, said in manifest["columns"].items()}
    kinds = ARRAYS | column_arrays(columns)

    def mapped(name: str) -> "np.ndarray":
        if not manifest["bytes"][name]:
            return np.zeros(0, dtype=kinds[name])
        return np.asarray(np.memmap(folder / name, dtype=kinds[name], mode="r"))

    def values(name: str, column: Column) -> Any:
        found = mapped(f"column-{name}")
        return Texts(found, mapped(f"column-{name}-offsets")) if column.dtype == "json" else found.reshape(
            -1, *column.shape)  # fmt: skip

    arrays: dict[str, Any] = {name: mapped(name) for name in ARRAYS}
    said = {name: manifest[name] for name in ("rows_in", "refused", "reading")}
    held = {name: values(name, column) for name, column in columns.items()}
    return Table(
        label=source.label,
        source=source,
        sides=tuple(manifest["sides"]),
        columns=columns,
        values=held,
        **said,
        **arrays,
    )
