"""What tells the rows of a source from others, for checkpoints (see runtime/identity.py)."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from posttrain.blocks.data.readers import LocalFiles
from posttrain.blocks.data.sources import Source

if TYPE_CHECKING:
    from posttrain.blocks.data.store import Table

HEAD = 2**20
"""Bytes of a file that is streamed which are looked at: such files may be larger than a disk."""


def of_tables(tables: "Sequence[Table]") -> dict[str, Any]:
    """Return a count and a checksum of what each source became: tokens, masks, and where documents begin."""
    found = {}
    for number, table in enumerate(tables):
        whole = 0
        for array in (table.offsets, table.ids, table.mask):
            whole = zlib.crc32(memoryview(array), whole)  # type: ignore[arg-type]  # it is one
        found[f"{number} {table.label}"] = {"rows": table.rows_in, "checksum": f"{whole:08x}"}
    return found


def of_streams(sources: "Sequence[Source]") -> dict[str, Any]:
    """Return size and checksum of the beginnings of local files; what is on the hub cannot be told from here."""
    found = {}
    for number, source in enumerate(sources):
        reader = source.open() if source.is_local else None
        if isinstance(reader, LocalFiles):
            whole = 0
            for path in reader.paths:
                with path.open("rb") as file:
                    whole = zlib.crc32(file.read(HEAD), whole)
            size = sum(path.stat().st_size for path in reader.paths)
            found[f"{number} {source.label}"] = {"bytes": size, "checksum": f"{whole:08x}"}
    return found
