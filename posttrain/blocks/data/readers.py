"""Rows of files, folders and hub datasets, each with its place and the position to go on from."""

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import attrs

from posttrain.blocks.data.hashes import sha256
from posttrain.blocks.data.rows.formats import (
    FILE_READERS,
    FORMATS,
    TEXTS,
    Values,
    format_of,
    parquet_row,
    without_nulls,
)
from posttrain.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

T = TypeVar("T")
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
            values = parquet_row(self.paths[index], within or 0)
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
            for values in rows_of(batch):
                number += 1
                yield values, f"{self.label} row {number - 1}", number

    def row(self, at: Any) -> Values:
        """Return the row at a position."""
        number = at or 0
        (values,) = rows_of(undecoded(self.dataset)[number : number + 1])
        return values

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
            yield without_nulls(values), f"{self.label} row {number - 1}", [number, dataset.state_dict()]

    def row(self, at: Any) -> Values:
        """Return the row at a position."""
        return next(self.rows(at))[0]

    def fingerprint(self, memory: Path | None = None) -> str:
        """Refuse: what has not been read cannot be hashed."""
        raise DataError(f"{self.label} is a stream; streams are not cached")


def undecoded(dataset: Any) -> Any:
    """Return a dataset whose images stay as they are stored, as bytes or paths: nobody needs all of them decoded."""
    return dataset.with_format("arrow") if "Image(" in repr(dataset.features) else dataset


def rows_of(batch: Any) -> Iterator[Values]:
    """Yield the rows of a batch of `datasets`, which is a mapping of columns or an Arrow table."""
    columns = batch if isinstance(batch, dict) else batch.to_pydict()
    for values in zip(*columns.values(), strict=True):
        yield without_nulls(dict(zip(columns, values, strict=True)))


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
    files = _chosen(path, splits, split) if splits else []
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


def _chosen(path: Path, splits: Mapping[str, T], split: str) -> T:
    if split not in splits:
        raise DataError(f"{path} holds the splits {', '.join(splits)}, not {split!r}; set `split` on the source")
    return splits[split]


def _saved_dataset(path: Path, split: str) -> ArrowRows:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    return ArrowRows(_chosen(path, dataset, split) if isinstance(dataset, DatasetDict) else dataset, str(path))
