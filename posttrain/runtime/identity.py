"""What a run computes from beside its recipe: the rows, the weights it begins with, the code that a recipe names.

A checkpoint keeps a text for each, so that a run does not go on unnoticed with another file under the same name.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from posttrain.interfaces import Identified

if TYPE_CHECKING:
    from posttrain.trainer import Trainer


def identity(trainer: "Trainer") -> dict[str, Any]:
    """Return plain JSON data that differ where data, base weights or code do; what cannot be told is left out."""
    fields = {field.name: getattr(trainer, field.name) for field in attrs.fields(type(trainer)) if field.init}
    weights = {name: block.content() for name, block in fields.items() if isinstance(block, Identified)}
    code = {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in trainer.code}
    return {
        "data": trainer.run.loaders.identity(),
        "weights": {name: content for name, content in weights.items() if content is not None},
        "code": code,
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return a line for each part of a run's identity that differs; what is known of one side only is no difference."""
    lines = []
    for part in there.keys() & here.keys():
        for name in sorted(there[part].keys() & here[part].keys()):
            old, new = there[part][name], here[part][name]
            if old != new:
                lines.append(f"{part}: {name}: {_said(old)} there, {_said(new)} here")
    return sorted(lines)


def _said(found: Any) -> str:
    if isinstance(found, dict):
        return ", ".join(f"{name} {value:,}" if isinstance(value, int) else str(value) for name, value in found.items())
    return str(found)[:16]
