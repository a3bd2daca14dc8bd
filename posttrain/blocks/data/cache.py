"""Rows that are given from Python: they go into a file of the cache that is named by its content.

So a run goes on from its recipe alone, and the same rows are tokenized once.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.blocks.images.pixels import image_as_text
from posttrain.errors import DataError
from posttrain.values import default_cache

log = logging.getLogger("posttrain")


def file_of(rows: Iterable[Any]) -> Path:
    """Return the JSON lines file that holds these rows.

    Args:
        rows: dicts of plain JSON data; a generator is read to its end.

    Raises:
        DataError: a row is no dict, holds what JSON does not, or there are none.
    """
    folder = default_cache() / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    draft, content, count = folder / f"{os.getpid()}.part", hashlib.sha256(), 0
    try:
        with draft.open("wb") as file:
            for row in rows:
                line = _line(row, count)
                content.update(line)
                file.write(line)
                count += 1
        if not count:
            raise DataError("sources: there are no rows")
        return draft.rename(folder / f"{content.hexdigest()[:32]}.jsonl")
    except OSError as error:
        raise DataError(
            f"sources: rows cannot be kept in {folder}: {error.strerror or error}; set $POSTTRAIN_CACHE"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def asked_once(kind: str, said: Any, rows: Iterable[dict[str, Any]], name: str, folder: Path) -> Path:
    """Return the JSON lines file with rows that something else is asked for, if it was not asked before.

    So all ranks of a run train on the same rows, and a run goes on with them.

    Args:
        kind: a folder in the cache.
        said: all that decides what is answered, as plain data.
        rows: what it answers; nothing is asked before this is iterated.
        name: of the source, for messages.
        folder: the cache; of processes that ask at once, one does.
    """
    from filelock import FileLock

    content = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    file = folder / kind / f"{content[:32]}.jsonl"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            aside = file.with_suffix(f".tmp-{os.getpid()}")
            try:
                count = 0
                with aside.open("w", encoding="utf-8") as out:
                    for row in rows:
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")
                        count += 1
                aside.rename(file)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
            finally:
                aside.unlink(missing_ok=True)
            log.info("%s: %s rows, kept in %s; another `revision` asks again", name, f"{count:,}", file)
    return file


def _line(row: Any, number: int) -> bytes:
    if not isinstance(row, dict):
        raise DataError(f"sources: row {number} is no dict, but {type(row).__name__}")
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=image_as_text).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"sources: row {number} cannot be kept: {error}; from a `datasets.Dataset` with such columns call "
            "`dataset.to_parquet('rows.parquet')`, and give that name"
        ) from None
