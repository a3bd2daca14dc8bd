"""Rows through a step, without a server."""

from typing import Any

from posttrain.synth import Drop, Reply, Step

Row = dict[str, Any]


def through(step: Step, rows: list[Row]) -> tuple[list[Row], list[Drop]]:
    """What a step that sends nothing makes of rows."""
    made = [made for row in rows for made in step.fold(row, [])]
    made = [*step.table([row for row in made if not isinstance(row, Drop)]), *(d for d in made if isinstance(d, Drop))]
    return [m for m in made if not isinstance(m, Drop)], [m for m in made if isinstance(m, Drop)]


def reply(text: str, **choice: Any) -> Reply:
    return Reply({"choices": [{"message": {"role": "assistant", "content": text}, **choice}]})
