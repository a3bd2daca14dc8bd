"""When a reply counts as right: it is JSON, and says what the row's answer says. Used by `posttrain eval --code`."""

import json
import re

from posttrain.synth import verifier


@verifier("same_json")
def same_json(answer: str, row: dict, *, wanted: str = "answer") -> bool:
    """The first JSON object of the reply, also in a block of code, equals the row's."""
    found = re.search(r"\{.*?\}", answer, flags=re.DOTALL)
    try:
        return found is not None and json.loads(found[0]) == json.loads(row[wanted])
    except ValueError:
        return False
