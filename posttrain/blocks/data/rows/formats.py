"""The formats of files: each has a function that yields the rows of a file, from any position on.

Files are read here and not through `datasets`, so that a damaged one is reported with its name and line, and so
that reading can go on after any row: of a JSONL file by byte offset, of everything else by row number.
"""

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from posttrain.errors import DataError

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
TEXTS = (".txt", ".md")
"""A file is one row, with all of it in the column `text`."""
Values = dict[str, Any]


def format_of(path: Path) -> str | None:
    """Return the suffix that tells the format (`.jsonl` for `a.jsonl.gz`), or None if it is none of ours.

    >>> format_of(Path("a/b.jsonl.gz")), format_of(Path("b.txt")), format_of(Path("b.png"))
    ('.jsonl', '.txt', None)
    """
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS + TEXTS else None


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
        text = file.read()
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
                    yield without_nulls(values), number - 1, number
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter of texts and dates
        raise DataError(f"{path}: not a whole parquet file: {error}") from None


def parquet_row(path: Path, number: int) -> Values | None:
    """Return a row of a parquet file; only its row group is read."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            if number < (rows := file.metadata.row_group(group).num_rows):
                (values,) = file.read_row_group(group).slice(number, 1).to_pylist()
                return without_nulls(values)
            number -= rows
    return None


def _text(path: Path, at: Any) -> Iterator[tuple[Values, int, Any]]:
    if at:
        return
    with _open(path) as file:
        lines = [_decode(raw, path, number) for number, raw in enumerate(file, 1)]
    yield {"text": "".join(lines)}, 0, 1


def without_nulls(row: Values) -> Values:
    """Return a row of a table in which nested objects have no keys that hold nothing; the columns stay.

    All objects of a column have the same keys there: arguments of one tool get those of every other, as nulls.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(item) for key, item in value.items() if item is not None}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return {name: kept(value) for name, value in row.items()}


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
