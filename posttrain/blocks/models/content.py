"""What identifies the weights of a model without loading them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.blocks.models.adapters import origin
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.blocks.models.model import HFModel

HASHED = (".json", ".safetensors", ".bin")


def content_of(model: "HFModel") -> bytes | str | None:
    """Return names and hashes of the files of folders, or the commit of a hub model; None if nothing identifies it.

    Raises:
        RecipeError: the model's configuration cannot be loaded.
    """
    from transformers import AutoConfig

    if model.random_init:
        return None
    base, folders = origin(model.name_or_path)
    commit = b""
    if Path(base).is_dir():
        folders = [Path(base), *folders]
    else:
        try:
            found = AutoConfig.from_pretrained(base, **model.hub)._commit_hash
        except (OSError, ValueError) as error:
            raise RecipeError(f"model {base!r} cannot be loaded: {error}") from error
        if not found or not folders:
            return str(found) if found else None
        commit = str(found).encode()
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in HASHED]
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return commit + b"".join(threads.map(_named_hash, files))


def _named_hash(file: Path) -> bytes:
    with file.open("rb") as content:
        return file.name.encode() + hashlib.file_digest(content, "sha256").digest()
