"""Ways to keep documents apart that were found before, on the disk: trying takes seconds, and each process would.

What was found depends on the configuration, on transformers and torch, and on our own code that tried it; all of these
name the file.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from posttrain.blocks.models.documents.ways import Way
from posttrain.values import default_cache


def known_way(asked: list[Any], find: Callable[[], Way]) -> Way:
    """Return what is known of a model, or else find it out, and keep it.

    Args:
        asked: plain JSON data, what the model is and what is asked of it.
        find: tries; what it raises is not kept, nor what it could not prove.
    """
    file = default_cache() / "ways" / f"{named(asked)}.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return Way(**said | {"separated": tuple((name, alone) for name, alone in said["separated"])})
    except (OSError, ValueError, TypeError, KeyError):  # it is not there, or damaged
        way = find()
    if way.proven:
        draft = file.with_suffix(f".{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(attrs.asdict(way)), encoding="utf-8")
            draft.replace(file)
        except OSError:  # a cache that cannot be written costs time, and nothing else
            draft.unlink(missing_ok=True)
    return way


def named(asked: list[Any]) -> str:
    """Return a name for what is asked, by these versions and this code."""
    import torch
    import transformers

    models = Path(__file__).parent.parent  # networks, experts and images are tried, too
    ours = [file.read_bytes() for file in sorted(models.rglob("*.py"))]
    content = hashlib.sha256(json.dumps([asked, torch.__version__, transformers.__version__]).encode())
    content.update(b"".join(ours))
    return content.hexdigest()[:32]
