"""Pair: scored answers to the same prompt -> what DPO and reward models train on."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import attrs
from attrs.validators import ge, optional

from posttrain.registry import block, key
from posttrain.synth.pipelines.rows import Drop, Row, answered
from posttrain.synth.pipelines.step import Step


@attrs.frozen
class Answer:
    """A scored answer, and the row that it is from."""

    row: Row
    text: str
    score: float | None


@block("step", "pair")
class Pair(Step):
    """Pair better answers with worse ones to the same prompt.

    What comes out is what `data: {type: preference}` reads: `prompt`, `chosen`, `rejected`, `score_chosen`,
    `score_rejected`, `margin`; and where they are known, `model_chosen`, `model_rejected`, and the judgements.
    """

    strategy: Literal["best_worst", "best_random", "all"] = "best_worst"
    """`best_worst`: one pair per prompt. `best_random`: the best with any that is worse (as in Zephyr,
    arXiv:2310.16944). `all`: each with each that is worse."""
    margin: float = key(0.0, check=ge(0))
    """Difference of scores that a pair has at least; equal scores never make a pair."""
    max_len_ratio: float | None = key(None, check=optional(ge(1)))
    """How many times as long as the other the longer answer may be, in characters."""
    score: str | None = "score"
    """Column of the score. Null pairs answers as they come, for a step `compare` to decide."""
    keep: list[str] = attrs.field(factory=list)
    """Columns of the chosen answer's row to keep."""

    def table(self, rows: Iterable[Row]) -> Iterable[Row | Drop]:
        """Return the pairs of each prompt, in the order of the prompts; answers in no pair are dropped."""
        groups: dict[str, tuple[list[Any], list[Answer]]] = {}
        for row in rows:
            prompt, text = answered(row)
            score = row.get(self.score) if self.score else None
            number = float(score) if isinstance(score, int | float) and not isinstance(score, bool) else None
            name = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
            groups.setdefault(name, (prompt, []))[1].append(Answer(row, text, number))
        for name, (prompt, answers) in groups.items():
            yield from self.group(name, prompt, answers)

    def group(self, name: str, prompt: list[Any], answers: list[Answer]) -> Iterator[Row | Drop]:
        """Yield the pairs among the answers to one prompt, then what is in none."""
        usable: list[Answer] = []
        for answer in answers:
            if self.score and answer.score is None:
                yield Drop(answer.row, f"there is no {self.score}")
            elif any(answer.text == other.text for other in usable):
                yield Drop(answer.row, "the same text as another answer")
            else:
                usable.append(answer)
        if len(usable) == 1:
            yield Drop(usable[0].row, "the only answer to its prompt")
            return
        used: set[int] = set()
        reason = "a tie: no answer is better by the margin"
        for better, worse in self.candidates(name, usable):
            if self.too_unequal(better.text, worse.text):
                reason = "one answer is too much longer than the other"
                continue
            used |= {id(better), id(worse)}
            yield self.pair(prompt, better, worse)
        for answer in usable:
            if id(answer) not in used:
                yield Drop(answer.row, "neither the best nor the other of its pair" if used else reason)

    def candidates(self, name: str, answers: list[Answer]) -> list[tuple[Answer, Answer]]:
        """Return (better, worse) as the strategy has it."""
        if not self.score:
            each = [(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]]
            return each if self.strategy == "all" else each[:1]
        ranked = sorted(answers, key=lambda answer: -(answer.score or 0.0))
        each = [(a, b) for a in ranked for b in ranked if _gap(a, b) > 0 and _gap(a, b) >= self.margin]
        if self.strategy == "all" or not each:
            return each
        best = [pair for pair in each if pair[0] is ranked[0]]
        if self.strategy == "best_worst":
            return best[-1:]
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return [best[draw % len(best)]]

    def too_unequal(self, a: str, b: str) -> bool:
        """Whether one text is too much longer than the other."""
        longer, shorter = max(len(a), len(b)), min(len(a), len(b))
        return self.max_len_ratio is not None and longer > self.max_len_ratio * shorter

    def pair(self, prompt: list[Any], better: Answer, worse: Answer) -> Row:
        """Return a row of preference data."""
        made = {name: better.row.get(name) for name in self.keep}
        made |= {"prompt": prompt, "chosen": better.text, "rejected": worse.text}
        for name in ("model", "judgements"):  # who said it, and why it has its score
            made |= {
                f"{name}_{side}": a.row[name] for side, a in (("chosen", better), ("rejected", worse)) if name in a.row
            }
        if not self.score:
            return made
        scores = {"score_chosen": better.score, "score_rejected": worse.score, "margin": _gap(better, worse)}
        return made | scores

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return the mean margin, and how often the chosen answer is the longer one: far from a half, and a model can
        learn length instead of what was meant."""
        found = list(rows)
        if not found:
            return {}
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in found) / len(found)
        margins = [row["margin"] for row in found if "margin" in row]
        return {"chosen is the longer one": longer} | ({"mean margin": sum(margins) / len(margins)} if margins else {})


def _gap(better: Answer, worse: Answer) -> float:
    return (better.score or 0.0) - (worse.score or 0.0)
