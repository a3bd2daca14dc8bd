"""Reward: the number that a reward model gives an answer; higher is better."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from posttrain.registry import block
from posttrain.synth.pipelines.rows import Chat, Drop, Reply, Row, answered
from posttrain.synth.pipelines.step import Asking

CLASSIFY = "/classify"


@block("step", "reward")
class Reward(Asking):
    """Score answers by a reward model.

    On a vLLM server (`vllm serve MODEL --runner pooling`), or in this process with
    `client: {type: transformers, name_or_path: ...}`. The row gets `score`, the raw logit.
    """

    into: str = "score"
    """Column of the score."""

    def chats(self, row: Row) -> list[Chat]:
        """Return one request for the logit of the whole conversation."""
        prompt, answer = answered(row)
        messages = [*prompt, {"role": "assistant", "content": answer}]
        return [Chat(messages, self.model, {"use_activation": False, **self.body}, CLASSIFY)]

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the row with its score."""
        (reply,) = replies
        if reply.body is None:
            return [Drop(row, reply.trouble)]
        score = logit(reply.body)
        if score is None:
            return [Drop(row, "the reply holds no single number: is it a reward model?")]
        return [{**row, self.into: score}]

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return the mean score."""
        scores = [float(row[self.into]) for row in rows]
        return {"mean score": statistics.fmean(scores)} if scores else {}


def logit(body: dict[str, Any]) -> float | None:
    """Return the one number of a reply of `/classify`."""
    try:
        (entry,) = body["data"]
        (number,) = entry["probs"]
        return float(number) if math.isfinite(number) else None
    except (KeyError, TypeError, ValueError):
        return None
