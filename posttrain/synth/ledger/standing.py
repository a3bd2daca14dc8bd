"""How a task stands: how much is done, failed or under way, what it has used, and what is still to be sent."""

from typing import NamedTuple

from posttrain.synth.ledger.keys import CHAT, LIMITS
from posttrain.synth.ledger.store import OPEN, WAITING, Ledger


class Counts(NamedTuple):
    """How a task stands."""

    total: int
    done: int
    failed: int
    """Without a result: given up, or refused for good. The first kind is tried again by the next run."""
    permanent: int
    """Those of the failed that a run sends again only when asked to."""
    waiting: int
    """In a batch that is not finished."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    cost: float | None
    """Dollars; None if some reply's price is not known."""


def counts(ledger: Ledger, task: int) -> Counts:
    """Return how a task stands."""
    total, done, failed, permanent, waiting, *tokens, micros, unknown = ledger.one(
        f"""SELECT count(*), count(p.request), coalesce(sum(p.request IS NULL AND f.request IS NOT NULL), 0),
            coalesce(sum(p.request IS NULL AND f.permanent), 0), coalesce(sum(p.request IS NULL AND {WAITING}), 0),
            coalesce(sum(p.input_tokens), 0), coalesce(sum(p.output_tokens), 0), coalesce(sum(p.cached_tokens), 0),
            coalesce(sum(p.cost_micros), 0), coalesce(sum(p.request IS NOT NULL AND p.cost_micros IS NULL), 0)
        FROM item i LEFT JOIN response p ON p.request = i.request LEFT JOIN failure f ON f.request = i.request
        WHERE i.task = ?""", task,
    )  # fmt: skip
    given, made, cached = tokens
    cost = None if unknown else micros / 1e6
    return Counts(total, done, failed, permanent, waiting, given, made, cached, cost)


def to_send(ledger: Ledger, task: int) -> list[tuple[str, int, int, int]]:
    """Return (model, requests, prompt tokens, reply tokens at most) of what is to be sent, estimated."""
    return ledger.all(
        f"""SELECT r.model, count(*), sum(r.tokens), sum(r.reserve) FROM item i JOIN request r ON r.id = i.request
        WHERE i.task = ? AND {OPEN} AND NOT {WAITING} GROUP BY r.model ORDER BY r.model""", task,
    )  # fmt: skip


def used(ledger: Ledger, task: int) -> list[tuple[str, int, int, int]]:
    """Return (model, prompt tokens, reply tokens, cached prompt tokens) that the results of a task have used."""
    return ledger.all(
        """SELECT r.model, sum(p.input_tokens), sum(p.output_tokens), sum(p.cached_tokens) FROM item i
        JOIN request r ON r.id = i.request JOIN response p ON p.request = r.id WHERE i.task = ? GROUP BY r.model""",
        task,
    )


def in_batches(ledger: Ledger, task: int) -> list[tuple[str, int, int, int]]:
    """Return (model, requests, prompt tokens, reply tokens at most) of what is in batches, estimated."""
    return ledger.all(
        f"""SELECT r.model, count(*), sum(r.tokens), sum(r.reserve) FROM item i JOIN request r ON r.id = i.request
        WHERE i.task = ? AND NOT EXISTS (SELECT 1 FROM response p WHERE p.request = i.request) AND {WAITING}
        GROUP BY r.model""", task,
    )  # fmt: skip


def unbounded(ledger: Ledger, task: int) -> int:
    """Return how many of the chats to be sent set no bound on their reply."""
    no_bound = " AND ".join(f"NOT instr(r.body, CAST('\"{name}\":' AS BLOB))" for name in LIMITS)
    (count,) = ledger.one(
        f"""SELECT count(*) FROM item i JOIN request r ON r.id = i.request WHERE i.task = ? AND {OPEN}
        AND NOT {WAITING} AND r.endpoint = '{CHAT}' AND {no_bound}""", task,
    )  # fmt: skip
    return int(count)


def errors(ledger: Ledger, task: int) -> list[tuple[str, str, int, int]]:
    """Return (code, message of one of them, how many, how many of them for good) of what has no result."""
    return ledger.all(
        """SELECT f.code, min(f.message), count(*), sum(f.permanent) FROM item i
            JOIN failure f ON f.request = i.request LEFT JOIN response p ON p.request = i.request
        WHERE i.task = ? AND p.request IS NULL GROUP BY f.code ORDER BY count(*) DESC, f.code""", task,
    )  # fmt: skip
