"""What judges write, read: JSON as they were asked for, or what is as clear; and the markers around what they judge.

A reply that could be read in two ways is not readable: the judge is asked again.
"""

import hashlib
import json
import re
from typing import Any

THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
NUMBER = r"[-+]?\d+(?:\.\d+)?"
SAID = re.compile(rf"\bscore\b[\W_]*(?:is|of)?[\W_]*?({NUMBER})(?:\s*(?:/|out of)\s*(\d+))?", re.IGNORECASE)
WINNER = re.compile(r"\bwinner\b[\W_]*(?:is)?[\W_]*(?:answer\s+)?(a|b|tie)\b", re.IGNORECASE)
MARKER = re.compile(r"\[\s*(?:end of|conversation|answer)\b", re.IGNORECASE)


def structured(name: str, **fields: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a request that asks for JSON: a rationale first, then the fields."""
    properties = {"rationale": {"type": "string"}, **fields}
    schema = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return {"response_format": {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}}


def json_in(text: str, wanted: str) -> dict[str, Any]:
    """Return the JSON object of a reply that holds what is wanted; servers that ignore the schema put it into prose or
    a code block. One with a rationale comes before one without; of two that disagree, neither is returned.

    >>> json_in('Well: ```json {"rationale": "good", "score": 4}``` and not {"score": 1}', "score")
    {'rationale': 'good', 'score': 4}
    """
    text, decoder, found, end = THOUGHTS.sub("", text), json.JSONDecoder(), [], 0
    while (start := text.find("{", end)) >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
            continue
        if isinstance(value, dict) and wanted in value:
            found.append(value)
    best = [value for value in found if "rationale" in value] or found
    return best[0] if best and all(value[wanted] == best[0][wanted] for value in best) else {}


def score_in(text: str, low: int, high: int) -> tuple[float | None, Any]:
    """Return (score, rationale) of a judge's reply; a score of None if it names none on the scale, or several.

    >>> score_in("Clear and right. Score: 4/5", 1, 5), score_in("4", 1, 5), score_in('{"score": "4"}', 1, 5)
    ((4.0, 'Clear and right. Score: 4/5'), (4.0, '4'), (4.0, None))
    """
    text = THOUGHTS.sub("", text).strip()
    found = json_in(text, "score")
    if found:
        return on_scale(found["score"], low, high), found.get("rationale")
    bare = on_scale(text.strip("\"'`*. "), low, high)
    said = {on_scale(f"{m[1]}/{m[2]}" if m[2] else m[1], low, high) for m in SAID.finditer(text)}
    fractions = {on_scale(f"{m[1]}/{m[2]}", low, high) for m in re.finditer(rf"({NUMBER})\s*/\s*(\d+)", text)}
    named = {bare} if bare is not None else said or fractions
    return (named.pop() if len(named) == 1 else None), text or None


def on_scale(value: Any, low: int, high: int) -> float | None:
    """Return a score that is on the scale: a number, `"4"`, or `"4/5"` where 5 is the best."""
    if isinstance(value, str) and (found := re.fullmatch(rf"({NUMBER})(?:\s*/\s*(\d+))?", value.strip())):
        value = float(found[1]) if found[2] in (None, str(high)) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return None
    return float(value)


def winner_in(text: str) -> str | None:
    """Return A, B or tie, as a judge's reply names it; None if it names nobody, or several.

    >>> winner_in('{"winner": "Tie"}'), winner_in("winner: Answer b"), winner_in("[[A]]"), winner_in("A or B")
    ('tie', 'B', 'A', None)
    """
    text = THOUGHTS.sub("", text).strip()
    found = json_in(text, "winner")
    if found:
        names = {str(found["winner"]).strip(" .[]\"'").lower().removeprefix("answer").strip()}
    else:
        names = {m[1].lower() for m in WINNER.finditer(text)}
        names = names or {m.lower() for m in re.findall(r"\[\[(A|B|tie|C)\]\]", text)}
        names = names or {text.strip("\"'`*. ").lower().removeprefix("answer").strip()}
    known = {"a": "A", "b": "B", "tie": "tie", "draw": "tie", "c": "tie"}
    return known.get(names.pop()) if len(names) == 1 else None


def mark(*shown: str) -> str:
    """Return what the markers around texts carry so that no text can close them: nothing, unless one looks like a
    marker; then digits that are made from the texts themselves, which no text can hold."""
    if not any(MARKER.search(text) for text in shown):
        return ""
    return " " + hashlib.sha256("\0".join(shown).encode()).hexdigest()[:12]
