"""Rows of files, folders and hub datasets, each with its place and the position to go on from.

Files are read here and not through `datasets`, so that a damaged one is reported with its name and line, and so
that a reader can be put back to any row: a JSONL file by byte offset, everything else by row number.
"""

import csv
import gzip
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import attrs

from posttrain.blocks.data.hashes import sha256
from posttrain.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
TEXTS = (".txt", ".md")
"""A file is one row, with all of it in the column `text`."""
Values = dict[str, Any]
log = logging.getLogger("posttrain")


class Row(NamedTuple):
    """One row of a source."""

    values: Values
    number: int
    """Counted from 0 within the source."""
    place: str
    """Where a person finds it: `file.jsonl:12`, `name[train] row 11`."""


class Reader(Protocol):
    """What a source is read through; `at` is a JSON-able position, None for the beginning."""

    def rows(self, at: Any) -> Iterator[tuple[Values, str, Any]]:
        """Yield (values, place, position after this row)."""

    def row(self, at: Any) -> Values:
        """Return the row at a position that `rows` gave, or the first."""

    def fingerprint(self, memory: Path | None = None) -> str:
        """Return a hash that changes with the content; `memory` is a folder in which hashes of files are kept."""


@attrs.frozen
class LocalFiles:
    """Files of one format, read one after the other."""

    paths: list[Path]

    def rows(self, at: Any) -> Iterator[tuple[Values, str, Any]]:
        """Yield rows; the position is [index of the file, position within it]."""
        first, within = at or (0, None)
        for index, path in enumerate(self.paths[first:], first):
            read, unit = FILE_READERS[str(format_of(path))]
            try:
                for values, number, after in read(path, within):
                    yield values, f"{path}{unit}{number}", [index, after]
            except (OSError, EOFError) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            within = None

    def row(self, at: Any) -> Values:
        """Return the row at a position."""
        index, within = at or (0, None)
        if format_of(self.paths[index]) == ".parquet":
            values = _parquet_row(self.paths[index], within or 0)
            if values is not None:
                return values
        return next(self.rows(at))[0]

    def fingerprint(self, memory: Path | None = None) -> str:
        """Return the sha256 over names and bytes of all files."""
        whole = hashlib.sha256()
        for path in self.paths:
            whole.update(f"{path.name}\0{sha256(path, memory)}\n".encode())
        return whole.hexdigest()


@attrs.frozen
class ArrowRows:
    """A `datasets.Dataset` on disk."""

    dataset: "Dataset"
    label: str

    def rows(self, at: Any) -> Iterator[tuple[Values, str, Any]]:
        """Yield rows; the position is the number of the next row."""
        number, dataset = at or 0, undecoded(self.dataset)
        if number == len(dataset):  # `select` of nothing from the end is an IndexError
            return
        for batch in dataset.select(range(number, len(dataset))).iter(batch_size=512):
            columns, held = (
                (list(batch), batch.values())
                if isinstance(batch, dict)
                else (batch.column_names, batch.to_pydict().values())
            )
            for values in zip(*held, strict=True):
                number += 1
                row = {name: without_nulls(value) for name, value in zip(columns, values, strict=True)}
                yield row, f"{self.label} row {number - 1}", number

    def row(self, at: Any) -> Values:
        """Return the row at a position."""
        found = undecoded(self.dataset)[at or 0]
        found = found if isinstance(found, dict) else {name: column[0] for name, column in found.to_pydict().items()}
        return {name: without_nulls(value) for name, value in found.items()}

    def fingerprint(self, memory: Path | None = None) -> str:
        """Return the fingerprint that `datasets` keeps of the content."""
        return str(self.dataset._fingerprint)


@attrs.frozen
class HubStream:
    """A `datasets.IterableDataset`: rows come over the network as they are needed."""

    dataset: "IterableDataset"
    label: str

    def rows(self, at: Any) -> Iterator[tuple[Values, str, Any]]:
        """Yield rows; the position is [rows so far, `IterableDataset.state_dict()`]."""
        number, state = at or (0, None)
        dataset = self.dataset.skip(0)  # a copy: two passes must not share one position
        if state is not None:
            dataset.load_state_dict(state)
        for values in dataset:
            number += 1
            row = {name: without_nulls(value) for name, value in values.items()}
            yield row, f"{self.label} row {number - 1}", [number, dataset.state_dict()]

    def row(self, at: Any) -> Values:
        """Return the row at a position."""
        return next(self.rows(at))[0]

    def fingerprint(self, memory: Path | None = None) -> str:
        """Refuse: what has not been read cannot be hashed."""
        raise DataError(f"{self.label} is a stream; streams are not cached")


def undecoded(dataset: Any) -> Any:
    """Return a dataset whose images stay as they are stored, as bytes or paths: nobody needs all of them decoded."""
    return dataset.with_format("arrow") if "Image(" in repr(dataset.features) else dataset


def format_of(path: Path) -> str | None:
    """Return the suffix that tells the format (`.jsonl` for `a.jsonl.gz`), or None if it is none of ours.

    >>> format_of(Path("a/b.jsonl.gz")), format_of(Path("b.txt")), format_of(Path("b.png"))
    ('.jsonl', '.txt', None)
    """
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS + TEXTS else None


def local_reader(path: Path, split: str, name: str | None = None) -> Reader:
    """Open a file, a folder of files, or a folder that `Dataset.save_to_disk` wrote.

    Args:
        path: of the file or folder.
        split: which files of a folder, as `datasets` assigns them: by their names, or by `configs:` in a README.md.
        name: one of these configurations.

    Raises:
        DataError: nothing is there, or nothing in it can be read.
    """
    if path.is_file():
        if format_of(path) is None:
            every = ", ".join(FORMATS + TEXTS)
            raise DataError(f"{path}: unknown format (known: {every}; all but parquet also with .gz)")
        return LocalFiles([path])
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_dataset(path, split)
    splits = _splits(path, name)
    files = _chosen(path, splits, split)
    known = [f for f in files if format_of(f) in FORMATS]
    if not known:
        texts = [f for f in path.rglob("*") if format_of(f) in TEXTS]
        hint = f"; to read texts, name them: {path}/*{texts[0].suffix}" if texts else ""
        raise DataError(f"{path} holds no file that can be read (known: {', '.join(FORMATS)}){hint}")
    there = {f for f in path.rglob("*") if f.is_file() and format_of(f) in FORMATS}
    there = {f for f in there if not any(part.startswith((".", "__")) for part in f.relative_to(path).parts)}
    left = sorted(str(f.relative_to(path)) for f in there.difference(*splits.values()))
    if left and not (path / "README.md").is_file():  # whose `configs:` may mean to leave files out
        if formats := sorted({str(format_of(Path(f))) for f in left} - {str(format_of(f)) for f in known}):
            also = ", ".join([*sorted({str(format_of(f)) for f in known}), *formats])
            raise DataError(f"{path} holds files of several formats ({also}); name one file, or split them")
        log.warning("%s: %s: in no split, and not read", path, ", ".join(left))
    return LocalFiles(known)


def files_like(pattern: Path) -> Reader:
    """Open the files that a pattern with *, ? or ** fits, in the order of their names.

    Raises:
        DataError: there are none, or they are of several formats.
    """
    fixed = next(parent for parent in pattern.parents if not is_pattern(str(parent)))
    files = sorted(f for f in fixed.glob(str(pattern.relative_to(fixed))) if f.is_file())
    found = sorted({str(format_of(f)) for f in files if format_of(f)})
    if len(found) != 1:
        several = f"files of several formats ({', '.join(found)}): name them one by one"
        raise DataError(f"{pattern} fits {several if found else 'no file that can be read'}")
    return LocalFiles([f for f in files if format_of(f)])


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files."""
    return any(sign in name for sign in "*?[")


def _splits(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """Return the files of each split, as `datasets` finds them."""
    from datasets import load_dataset_builder

    try:
        with tempfile.TemporaryDirectory() as nowhere:  # it makes a folder for a cache, which is not used
            found = load_dataset_builder(str(folder), name, cache_dir=nowhere).config.data_files
    except FileNotFoundError:
        found = None
    except Exception as error:  # what a README.md says may be wrong in any way
        raise DataError(f"{folder} cannot be read as a dataset: {type(error).__name__}: {error}") from error
    return {str(split): sorted(map(Path, files)) for split, files in (found or {}).items()}


def _chosen(folder: Path, splits: dict[str, list[Path]], split: str) -> list[Path]:
    if splits and split not in splits:
        raise DataError(f"{folder} holds the splits {', '.join(splits)}, not {split!r}; set `split` on the source")
    return splits.get(split, [])


def _saved_dataset(path: Path, split: str) -> ArrowRows:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(f"{path} holds the splits {', '.join(dataset)}, not {split!r}; set `split` on the source")
        dataset = dataset[split]
    return ArrowRows(dataset, str(path))


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise DataError(f"{path}:{line}: not UTF-8 ({bad}); convert the file to UTF-8") from None


def _jsonl(path: Path, at: Any) -> Iterator[tuple[Values, int, Any]]:
    byte, line = at or (0, 0)
    with _open(path) as file:
        file.seek(byte)
        for raw in file:
            byte, line = byte + len(raw), line + 1
            if not raw.strip():
                continue
            text = _decode(raw, path, line)
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                cut = "" if raw.endswith(b"\n") else "; the last line is incomplete: was the file cut off?"
                raise DataError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}{cut}") from None
            except RecursionError:
                raise DataError(f"{path}:{line}: nested too deeply") from None
            if not isinstance(values, dict):
                raise DataError(f"{path}:{line}: expected an object with columns, found {_kind(values)}")
            yield values, line, [byte, line]


def _json(path: Path, at: Any) -> Iterator[tuple[Values, int, Any]]:
    with _open(path) as file:
        text = b"".join(line for line in file)
    for number, line in enumerate(text.split(b"\n"), 1):
        _decode(line, path, number)
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; one object per line? then name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(f'{path}: expected a list of rows or {{"data": [...]}}, found {_kind(rows)}')
    for number in range(at or 0, len(rows)):
        if not isinstance(rows[number], dict):
            raise DataError(f"{path} row {number}: expected an object with columns, found {_kind(rows[number])}")
        yield rows[number], number, number + 1


def _csv(path: Path, at: Any) -> Iterator[tuple[Values, int, Any]]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    with _open(path) as file:
        reader = csv.reader((_decode(raw, path, n) for n, raw in enumerate(file, 1)), strict=True)
        number = 0
        try:
            header = next(reader, [])
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(f"{path}:1: the header names {', '.join(map(repr, repeated))} more than once")
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DataError(f"{path}:{reader.line_num}: {len(fields)} fields, the header has {len(header)}")
                number += 1
                if number > (at or 0):
                    yield dict(zip(header, fields, strict=True)), reader.line_num, number
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _parquet(path: Path, at: Any) -> Iterator[tuple[Values, int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            first = 0
            while first < len(sizes) and number + sizes[first] <= (at or 0):
                number, first = number + sizes[first], first + 1
            batches = file.iter_batches(512, row_groups=range(first, len(sizes)))
            for values in chain.from_iterable(batch.to_pylist() for batch in batches):
                number += 1
                if number > (at or 0):
                    yield {name: without_nulls(value) for name, value in values.items()}, number - 1, number
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter of texts and dates
        raise DataError(f"{path}: not a whole parquet file: {error}") from None


def _parquet_row(path: Path, number: int) -> Values | None:
    """Return a row of a parquet file; only its row group is read."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            if number < (rows := file.metadata.row_group(group).num_rows):
                (values,) = file.read_row_group(group).slice(number, 1).to_pylist()
                return {name: without_nulls(value) for name, value in values.items()}
            number -= rows
    return None


def _text(path: Path, at: Any) -> Iterator[tuple[Values, int, Any]]:
    if at:
        return
    with _open(path) as file:
        lines = [_decode(raw, path, number) for number, raw in enumerate(file, 1)]
    yield {"text": "".join(lines)}, 0, 1


def without_nulls(value: Any) -> Any:
    """Return a value of a table without the keys that hold nothing.

    The objects of a column all have the same keys there: arguments of one tool get those of every other, as nulls.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


FILE_READERS = {
    ".jsonl": (_jsonl, ":"),
    ".ndjson": (_jsonl, ":"),
    ".json": (_json, " row "),
    ".csv": (_csv, ":"),
    ".parquet": (_parquet, " row "),
    ".txt": (_text, " row "),
    ".md": (_text, " row "),
}
"""Suffix -> (reader, what stands between the name of the file and the number of the line or row)."""
