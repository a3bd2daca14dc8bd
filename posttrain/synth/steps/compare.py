"""Compare: which of two answers is better, asked in both orders, because judges prefer a place (arXiv:2306.05685)."""

from collections.abc import Iterable, Iterator
from typing import Any

from attrs.validators import ge, min_len

from posttrain.registry import block, key
from posttrain.synth.pipelines.images import shown
from posttrain.synth.pipelines.rows import Chat, Drop, Reply, Row, asked, column, reply_text, transcript
from posttrain.synth.pipelines.step import PanelStep, asked_again
from posttrain.synth.pipelines.templates import filled
from posttrain.synth.steps.judge import SYSTEM
from posttrain.synth.steps.verdicts import json_in, mark, structured, winner_in

ASK = """\
[Conversation{mark}]
{conversation}
[End of the conversation{mark}]

[Answer A{mark}]
{a}
[End of answer A{mark}]

[Answer B{mark}]
{b}
[End of answer B{mark}]

{rubric}

First say in a few sentences why, then name the better answer. Reply with JSON only:
{{"rationale": "...", "winner": "A" or "B" or "tie"}}"""
UNREADABLE = "the reply names no winner"
CHOICES = ("A", "B", "tie")


@block("step", "compare")
class Compare(PanelStep):
    """Let models decide pairs: the better one of `chosen` and `rejected` becomes `chosen`; ties are dropped."""

    rubric: str = key("Which answer is better: more helpful, more correct, clearer?", check=min_len(1))
    """What makes an answer the better one. `{column}` stands for a column of the row."""
    swap: bool = True
    """Ask in both orders; who names another answer then has voted for a tie."""
    asks_again: int = key(1, check=ge(0))
    """How often a judge whose reply is not readable is asked again."""

    @property
    def sent(self) -> dict[str, Any]:
        """Ask for a rationale and a winner as JSON."""
        return {**structured("comparison", winner={"type": "string", "enum": list(CHOICES)}), **self.body}

    def chats(self, row: Row) -> list[Chat]:
        """Return one request for each judge and order."""
        said = {name: reply_text(column(row, name)) for name in ("chosen", "rejected")}
        prompt = asked(row)
        known = {"conversation": transcript(prompt), "rubric": filled(self.rubric, row)}
        known["mark"] = mark(known["conversation"], *said.values())
        found = []
        for model in self.panel:
            for first, second in _orders(self.swap):
                text = ASK.format(**known, a=said[first], b=said[second])
                system = {"role": "system", "content": SYSTEM}
                found.append(Chat([system, {"role": "user", "content": shown(text, prompt)}], model, self.sent))
        return found

    @property
    def rounds(self) -> int:
        """How often an unreadable judge is asked again."""
        return self.asks_again

    def again(self, chat: Chat, reply: Reply) -> Chat | None:
        """Return the question once more, if the reply names no winner."""
        if reply.error or winner_in(reply.said or ""):
            return None
        return asked_again(chat, reply.said, UNREADABLE, '{"rationale": "...", "winner": "A" or "B" or "tie"}')

    def fold(self, row: Row, replies: list[Reply]) -> Iterable[Row | Drop]:
        """Return the pair with the better answer as `chosen`, and `votes`: of each judge and order."""
        orders = list(_orders(self.swap))
        votes, balance, heard = [], 0, 0
        for start in range(0, len(replies), len(orders)):
            named = [winner(reply, order) for order, reply in zip(orders, replies[start:], strict=False)]
            why = [
                json_in(reply.said or "", "winner").get("rationale") for reply in replies[start : start + len(orders)]
            ]
            votes.append({"model": self.panel[start // len(orders)], "winners": named, "rationales": why})
            if None in named:
                continue
            heard += 1
            if len(set(named)) == 1 and named[0] != "tie":
                balance += 1 if named[0] == "chosen" else -1
        made = {**row, "votes": votes}
        if not heard:
            return [Drop(made, next((r.trouble for r in replies if r.said is None), UNREADABLE))]
        if balance == 0:
            return [Drop(made, "a tie: the judges, or the two orders, disagree")]
        return [made if balance > 0 else swapped(made)]

    def facts(self, rows: Iterable[Row]) -> dict[str, str | float]:
        """Return how often the judges overruled the order that the rows came in, and who named no winner."""
        found, unheard = [], dict.fromkeys(self.panel, 0)
        for row in rows:
            found.append(bool(row.get("overruled")))
            for vote in row["votes"]:
                unheard[vote["model"]] += None in vote["winners"]
        facts: dict[str, str | float] = {"pairs turned round": sum(found) / len(found)} if found else {}
        silent = {model: n for model, n in unheard.items() if n}
        return facts | {f"no winner from {m or 'the judge'}": f"{n:,} of {len(found):,}" for m, n in silent.items()}


def _orders(swap: bool) -> Iterator[tuple[str, str]]:
    yield "chosen", "rejected"
    if swap:
        yield "rejected", "chosen"


def winner(reply: Reply, order: tuple[str, str]) -> str | None:
    """Return whom a reply names: chosen, rejected or tie; None if it names nobody."""
    named = winner_in(reply.said or "")
    return None if named is None else {"A": order[0], "B": order[1], "tie": "tie"}[named]


def swapped(row: Row) -> Row:
    """Return a pair the other way round; scores go with their answers, and the margin says that they were overruled."""
    pairs = [(f"{about}chosen", f"{about}rejected") for about in ("", "score_", "model_", "judgements_")]
    turned = dict(pairs) | {b: a for a, b in pairs}
    made = {turned.get(name, name): value for name, value in row.items()}
    if isinstance(made.get("margin"), int | float):
        made["margin"] = -made["margin"]
    return {**made, "overruled": True}
