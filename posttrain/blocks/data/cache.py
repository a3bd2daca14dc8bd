"""Rows that are given from Python: they go into a file of the cache that is named by its content.

So a run goes on from its recipe alone, and the same rows are tokenized once.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.blocks.images.pixels import image_as_text
from posttrain.errors import DataError
from posttrain.values import default_cache


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
