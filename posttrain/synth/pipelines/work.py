"""One step at work on its rows: what it asks, wave by wave, and what it makes of the replies.

A wave is what is asked of all rows before any of it is answered: so that it can be a batch. What a row is asked in the
next wave follows from its replies so far, and from nothing else.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from posttrain.errors import DataError, SynthError
from posttrain.interfaces import StepBlock
from posttrain.synth.clients.client import Synth
from posttrain.synth.ledger import results
from posttrain.synth.ledger.keys import CHAT, canonical, in_order
from posttrain.synth.pipelines.images import on_wire
from posttrain.synth.pipelines.report import rows_in
from posttrain.synth.pipelines.rows import Chat, Drop, Reply, Row

Exchanges = list[tuple[Chat, Reply]]
Answers = dict[str, Iterator[tuple[str, bytes, Any]]]
"""Whom a wave asked -> the answers, in order."""


@attrs.define
class Work:
    """One step at work on the rows in a file."""

    step: StepBlock
    client: Synth
    """Where its requests go."""
    task: str
    incoming: Path
    waves: list[dict[str, str]] = attrs.field(factory=list)
    """Of each wave: whom it asks ("" is the client, others are named by the step) -> its task in the ledger."""
    redone: int = 0
    """Requests of the last wave that took the place of a reply of no use."""
    clients: dict[str, Synth] = attrs.field(init=False)
    """Whom the step asks."""

    def __attrs_post_init__(self) -> None:
        self.clients = {"": self.client, **others_of(self.step, self.client)}

    def tasks(self, wave: int) -> list[tuple[Synth, str]]:
        """Return the tasks of a wave in the ledger, and who answers each."""
        return [(self.clients[whom], task) for whom, task in self.waves[wave].items()]

    def ask(self) -> int:
        """Add what the step asks next to tasks of their own; return how many requests that is."""
        if len(self.waves) > self.step.rounds:
            return 0
        count, self.redone, asked = 0, 0, dict[str, str]()
        names = {whom: wave_name(self.task, len(self.waves), whom) for whom in self.clients}
        for whom, client in self.clients.items():
            client.begin_batch_task(names[whom])
        for chat, body, redone in self.wanted():
            self.clients[chat.to].add_request_to_batch_task(names[chat.to], chat.endpoint, body)
            asked[chat.to] = names[chat.to]
            count, self.redone = count + 1, self.redone + redone
        if count:
            self.waves.append(asked)
        return count

    def wanted(self) -> Iterator[tuple[Chat, dict[str, Any], bool]]:
        """Yield what is to be asked next, as a body, and whether that takes the place of a reply of no use."""
        answers = self.answers()
        for row, place in rows_in(self.incoming):
            with about(place):
                _, chats, redone = self.course(row, answers)
                yield from ((chat, body_of(self.clients[chat.to], chat), redone) for chat in chats)

    def made(self) -> Iterator[Row | Drop]:
        """Yield what the step makes of the rows."""
        dropped: list[Drop] = []

        def passed() -> Iterator[Row]:
            for made in self.folded():
                if isinstance(made, Drop):
                    dropped.append(made)
                else:
                    yield made

        for made in self.step.table(passed()):
            yield from dropped
            dropped.clear()
            yield made
        yield from dropped

    def folded(self) -> Iterator[Row | Drop]:
        """Yield what becomes of each row by itself, given the replies to what was asked about it."""
        for row, place, pairs in self.answered():
            with about(place):
                yield from self.step.fold(row, [reply for _, reply in pairs])

    def answered(self) -> Iterator[tuple[Row, str, Exchanges]]:
        """Yield each row, its place, and what it was asked with the replies; of what was asked again, the last."""
        answers = self.answers()
        for row, place in rows_in(self.incoming):
            with about(place):
                pairs, _, _ = self.course(row, answers)
            yield row, place, pairs

    def answers(self) -> list[Answers]:
        """Return the answers of each wave, from the beginning."""
        found = []
        for wave in self.waves:
            ledgers = {whom: self.clients[whom].ledger for whom in wave}
            found.append({
                whom: results.answers(ledgers[whom], ledgers[whom].find(task), task) for whom, task in wave.items()
            })  # fmt: skip
        return found

    def course(self, row: Row, answers: list[Answers]) -> tuple[Exchanges, list[Chat], bool]:
        """Return (what a row was asked with the replies, what it is to be asked next, whether that is a repetition)."""
        pairs: Exchanges = []
        wanted, places, begin = self.step.chats(row), None, 0
        for wave in answers:
            if not wanted:
                break
            got = [(chat, self.reply(chat, next(wave.get(chat.to, iter(())), None))) for chat in wanted]
            if places is None:
                begin, pairs = len(pairs), pairs + got
            else:
                for place, pair in zip(places, got, strict=True):
                    pairs[place] = pair
            again = [(i, self.step.again(*pairs[i])) for i in range(begin, len(pairs))]
            places = [i for i, chat in again if chat is not None]
            wanted = [chat for _, chat in again if chat is not None]
            if not wanted:
                places, wanted = None, self.step.then(row, [reply for _, reply in pairs])
        return pairs, wanted, places is not None

    def reply(self, chat: Chat, answer: Any) -> Reply:
        """Return the reply to a request, which must be the very one that was sent.

        Raises:
            SynthError: it is not: the step's `chats` gave other requests than before.
        """
        if answer is None or answer[0] != chat.endpoint or not _same(answer[1], body_of(self.clients[chat.to], chat)):
            raise SynthError(
                f"{type(self.step).__name__}.chats() gave another request than when it was sent. It must be a function "
                "of the row alone: no clock, no random numbers without a seed, no changing the row"
            )
        response = answer[2]
        return Reply((response["response"] or {}).get("body"), response["error"], chat)


def body_of(client: Synth, chat: Chat) -> dict[str, Any]:
    """Return the body of a request."""
    messages = on_wire(chat.messages)
    if chat.endpoint == CHAT:
        return client.body(chat.model, messages, chat.body)
    return {"model": chat.model, **({"messages": messages} if messages else {}), **chat.body}


def wave_name(task: str, number: int, whom: str = "") -> str:
    """Return the name of the task of what is asked in the n-th wave of somebody."""
    return (f"{task}+{number}" if number else task) + (f"@{whom}" if whom else "")


def client_of(step: StepBlock, home: Synth) -> Synth:
    """Return where a step's requests go: all clients of a pipeline keep them in one ledger."""
    own = getattr(step, "client", None)
    return home if own is None else at_home(own, home)


def others_of(step: StepBlock, home: Synth) -> dict[str, Synth]:
    """Return who answers besides, by the names that the step gives them."""
    return {whom: at_home(client, home) for whom, client in step.others.items()}


def at_home(client: Any, home: Synth) -> Synth:
    """Return a client that keeps its requests where another one does."""
    if not isinstance(client, Synth):
        raise SynthError(f"client: {type(client).__name__} is no client of posttrain.synth")
    return attrs.evolve(client, work_dir=home.work_dir)


def _same(sent: bytes, body: dict[str, Any]) -> bool:
    """Whether a body is the one that was sent, also if version 0.1 sent it with its keys in another order."""
    wanted = canonical(in_order(body))
    return sent == wanted or canonical(in_order(json.loads(sent))) == wanted


@contextmanager
def about(place: str) -> Iterator[None]:
    """Say which row an error is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
