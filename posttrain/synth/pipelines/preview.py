"""The first rows of a pipeline, before all of them are paid for: what is asked, what comes back, what it will cost.

The replies are in the ledger like any others, so that the run itself does not pay for them again.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import attrs

from posttrain.blocks.data.sources import Source
from posttrain.synth.clients.client import Synth
from posttrain.synth.ledger import standing
from posttrain.synth.ledger.keys import canonical
from posttrain.synth.ledger.session import Progress
from posttrain.synth.pipelines.pipeline import Pipeline, rows_to_begin_with
from posttrain.synth.pipelines.report import Report, dollars
from posttrain.synth.pipelines.rows import Chat, Reply, Row, message_text
from posttrain.synth.pipelines.work import Work, body_of, client_of

LONGEST = 1500
"""Characters of a message that are shown."""


@attrs.frozen
class Preview:
    """What came of the first rows."""

    report: Report
    rows: int
    """How many rows went through."""
    total: int
    """How many rows there are."""
    steps: list[tuple[str, list[tuple[Chat, list[Reply]]]]]
    """(step, what was asked with what came back), for each step that asks."""
    cost: float | None
    """Dollars that all rows are going to cost, by what these used; None if a price is not known."""
    tokens: int
    """Tokens that all rows are going to use, by what these used."""

    def lines(self) -> Iterator[str]:
        """Yield it as text."""
        for step, asked in self.steps:
            for number, (chat, replies) in enumerate(asked, 1):
                yield f"-- {step}, request {number} of {len(asked)}" + (f", to {chat.model}" if chat.model else "")
                for message in chat.messages:
                    yield f"[{message.get('role')}] {_short(message_text(message))}"
                for reply in replies:
                    yield f"=> {_short(said(reply))}"
        went = f"{self.rows:,} of {self.total:,} rows went through"
        price = "at a price that is not known (`prices` of the client)" if self.cost is None else dollars(self.cost)
        yield f"{went}; all are going to use about {self.tokens:,} tokens: {price}"


def preview(
    pipeline: Pipeline, rows: Source | Iterable[Row], client: Synth, task: str, first: int, *,
    max_cost: float | None = None, max_requests: int | None = None, retry_failed: bool = False,
    progress: Callable[[Progress], None] | None = None, say: Callable[[str], None] = lambda text: None,
) -> Preview:  # fmt: skip
    """Take the first rows through all steps, one request at a time where the run itself makes batches.

    Args:
        pipeline: the steps.
        rows: a source, or dicts of plain JSON data; all are counted, the first are used.
        client: where requests go.
        task: of the run; the preview has a folder and tasks of its own, called after it.
        first: how many rows.
        max_cost: dollars that the preview may cost.
        max_requests: requests that the preview may send.
        retry_failed: also send again what a server has refused for good.
        progress: called a few times a second while a step sends.
        say: called with a line about each step that sends.

    Raises:
        DataError: a row lacks what a step needs.
        SynthError: see `Synth.run`.
    """
    given = rows_to_begin_with(rows)
    taken = list(islice(given, first))
    total = len(taken) + sum(1 for _ in given)
    name = f"{task}-first"
    at_once = Pipeline([_at_once(step) for step in pipeline.steps])
    now = _online(client)
    report = at_once.run(
        taken, now, name, max_cost=max_cost, max_requests=max_requests, retry_failed=retry_failed, progress=progress,
        say=say,
    )  # fmt: skip
    steps, tokens, cost = [], 0, 0.0
    unpriced = False
    for number, (asking, planned) in enumerate(zip(at_once.steps, pipeline.steps, strict=True), 1):
        incoming = report.folder / report.stages[number - 1].file
        work = Work(asking, client_of(asking, now), f"{name}.{number}", incoming)
        while report.stages[number].requests and work.ask():  # what was asked, in the tasks of the ledger
            pass
        if not work.waves:
            continue
        steps.append((f"step {number} ({report.stages[number].name})", _exchanges(work)))
        payer = client_of(planned, client)
        tasks = (wave[""] for wave in work.waves if "" in wave)
        for done in tasks:
            for model, *used in standing.used(now.ledger, now.ledger.find(done)):
                tokens += used[0] + used[1]
                price = payer.prices.get(model)
                unpriced = unpriced or price is None
                cost += price.micros(used[0], used[1], used[2], batch=payer.batched) / 1e6 if price else 0.0
    factor = total / max(1, len(taken))
    return Preview(report, len(taken), total, steps, None if unpriced else cost * factor, round(tokens * factor))


def said(reply: Reply) -> str:
    """Return what came back, or why nothing did."""
    if reply.error:
        return f"{reply.trouble}: {reply.error.get('message') or ''}"
    message: dict[str, Any] = reply.choice.get("message") or {}
    return message_text(message) or (canonical(reply.body).decode() if not message else reply.trouble)


def _exchanges(work: Work) -> list[tuple[Chat, list[Reply]]]:
    """Return what was asked, each request once with all that came back to it."""
    found = [pair for _, _, pairs in work.answered() for pair in pairs]
    groups = groupby(found, key=lambda pair: canonical(body_of(work.clients[pair[0].to], pair[0])))
    listed = (list(group) for _, group in groups)
    return [(pairs[0][0], [reply for _, reply in pairs]) for pairs in listed]


def _online(client: Any) -> Any:
    """Return a client that answers at once, where one makes batches: what it brings is the same to the ledger."""
    return attrs.evolve(client, mode="online") if client.batched else client


def _at_once(step: Any) -> Any:
    own = getattr(step, "client", None)
    return attrs.evolve(step, client=_online(own)) if isinstance(own, Synth) else step


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} characters more)"
