"""Score held-out pairs with plain transformers: nothing of posttrain is used, so that its own evaluation is checked."""

import math
from pathlib import Path
from typing import NamedTuple

import make_pairs
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

LogProbs = list[tuple[float, float]]
"""Of each pair: the summed log-probabilities of the chosen and of the rejected reply, in nats."""


class Estimate(NamedTuple):
    """A mean over pairs, and its standard error when questions are drawn at random, each with all its pairs."""

    mean: float
    error: float
    percent: bool = False

    def __str__(self) -> str:
        if self.percent:
            return f"{self.mean:.1%} ± {100 * self.error:.1f}"
        return f"{self.mean:.3f} ± {self.error:.3f}"


def tokens(tokenizer, prompt: str, reply: str) -> tuple[list[int], int]:
    """Return the tokens of a conversation up to the end of the reply's turn, and where the reply begins."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    before = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chat)["input_ids"]
    return whole[:-1], len(before)  # the last token is the line break behind the turn


def fitting(exported: Path, pairs: list[dict], longest: int) -> list[dict]:
    """Return the pairs that training does not leave out for having a side of more than `longest` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    sides = ("chosen", "rejected")
    return [p for p in pairs if all(len(tokens(tokenizer, p["prompt"], p[s])[0]) < longest for s in sides)]


def log_probs(exported: Path, pairs: list[dict]) -> LogProbs:
    """Return the log-probabilities under an exported model."""
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    asked = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    rows = sorted(((*tokens(tokenizer, *key), key) for key in set(asked)), key=lambda row: len(row[0]))
    found = {}
    for begin in range(0, len(rows), 16):
        batch = rows[begin : begin + 16]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(whole) for whole, _, _ in batch], batch_first=True)
        with torch.no_grad():
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits  # causal: nobody sees the padding behind
            each = -cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        for (whole, start, key), values in zip(batch, each, strict=True):
            found[key] = float(values[start - 1 : len(whole) - 1].double().sum())
    return [(found[ours], found[theirs]) for ours, theirs in zip(asked[::2], asked[1::2], strict=True)]


def estimate(pairs: list[dict], values: list[float]) -> Estimate:
    """Return the mean of a value of each pair; pairs of the same question do not count as independent."""
    mean = sum(values) / len(values)
    sums: dict[str, float] = {}
    for pair, value in zip(pairs, values, strict=True):
        sums[pair["prompt"]] = sums.get(pair["prompt"], 0.0) + value - mean
    return Estimate(mean, math.sqrt(sum(x * x for x in sums.values())) / len(values))


def right(pairs: list[dict], margins: list[float]) -> Estimate:
    """Return the share of pairs with a margin above 0; of those with none, half count."""
    return estimate(pairs, [0.5 if m == 0 else float(m > 0) for m in margins])._replace(percent=True)


def upset(pair: dict) -> bool:
    """Whether the model that is right less often in general is the one that is right here."""
    return make_pairs.MODELS.index(pair["chosen_by"]) < make_pairs.MODELS.index(pair["rejected_by"])


def of_model(pairs: list[dict], beta: float, reference: LogProbs, policy: LogProbs) -> dict[str, Estimate]:
    """Return what the pairs say of a model, by what it changed over the one that DPO began with."""
    margins = [beta * ((p[0] - r[0]) - (p[1] - r[1])) for p, r in zip(policy, reference, strict=True)]
    upsets = [upset(pair) for pair in pairs]
    found = {
        "margin of rewards": estimate(pairs, margins),
        "loss": estimate(pairs, [math.log1p(math.exp(-margin)) for margin in margins]),
        "accuracy of rewards": right(pairs, margins),
    }
    for name, wanted in (("stronger", False), ("weaker", True)):
        kept = [(p, m) for p, m, is_upset in zip(pairs, margins, upsets, strict=True) if is_upset is wanted]
        found[f"  where the {name} author is right ({len(kept)})"] = right([p for p, _ in kept], [m for _, m in kept])
    found["log-probability of correct ones"] = estimate(pairs, [chosen for chosen, _ in policy])
    found["log-probability of wrong ones"] = estimate(pairs, [rejected for _, rejected in policy])
    return found


def of_rules(pairs: list[dict], reference: LogProbs) -> dict[str, Estimate]:
    """Return how often rules that need no DPO tell which side is correct."""
    return {
        "the shorter one": right(pairs, [len(pair["rejected"]) - len(pair["chosen"]) for pair in pairs]),
        "the one that is likelier after SFT": right(pairs, [chosen - rejected for chosen, rejected in reference]),
        "the one whose author is right more often": right(pairs, [-1.0 if upset(pair) else 1.0 for pair in pairs]),
    }
