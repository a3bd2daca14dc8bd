"""A folder that is there whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import RecipeError


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Yield a folder beside it to write into, which gets its name at the end; after an error it is removed.

    Raises:
        RecipeError: the folder is in use.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder} is not empty: name another with -o")
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)
