"""The batches of a task as the ledger knows them: a state is committed before the step that leaves it."""

import time
from collections.abc import Sequence
from typing import Any

import attrs

from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.store import REQUEST, Ledger

ASKED = "cancelled_by_posttrain"
"""Stands among the errors of a batch that we asked to be cancelled: what is left of it may be sent again."""
STATES = ("planned", "uploading", "uploaded", "creating", "submitted", "terminal")
"""In their order; the last one is `ingested`, and then the batch is no longer open."""


@attrs.frozen
class Batch:
    """One batch."""

    id: int
    nonce: str
    state: str
    endpoint: str
    model: str
    lines: int
    bytes: int
    sha256: str
    file_id: str | None
    batch_id: str | None
    status: str | None
    output_file_id: str | None
    error_file_id: str | None
    errors: str | None

    @property
    def asked(self) -> bool:
        """Whether it was this library that asked for it to be cancelled."""
        return self.errors is not None and ASKED in self.errors


COLUMNS = ", ".join(field.name for field in attrs.fields(Batch))


class Batches:
    """Those of one task."""

    def __init__(self, ledger: Ledger, task: int) -> None:
        self.ledger, self.task = ledger, task

    def open(self, *states: str) -> list[Batch]:
        """Return those in some states, or all that are not ingested; also another task's with requests of this one."""
        wanted = states or STATES
        marks = ", ".join("?" * len(wanted))
        rows = self.ledger.all(
            f"""SELECT {COLUMNS} FROM batch b WHERE state IN ({marks}) AND (task = ? OR EXISTS (SELECT 1
                FROM batch_item bi JOIN item i ON i.request = bi.request WHERE bi.batch = b.id AND i.task = ?))
            ORDER BY id""", *wanted, self.task, self.task,
        )  # fmt: skip
        return [Batch(*row) for row in rows]

    def add(
        self, nonce: str, endpoint: str, model: str, members: Sequence[int], size: int, sha256: str
    ) -> None:  # fmt: skip
        """Commit a batch that is planned: its file holds these requests, and has that size and checksum."""
        with self.ledger.transaction() as db:
            row = (self.task, nonce, endpoint, model, len(members), size, sha256, time.time())
            batch = db.execute(
                "INSERT INTO batch(task, nonce, state, endpoint, model, lines, bytes, sha256, created) "
                "VALUES (?, ?, 'planned', ?, ?, ?, ?, ?, ?)", row,
            ).lastrowid  # fmt: skip
            db.executemany("INSERT INTO batch_item VALUES (?, ?)", ((member, batch) for member in members))

    def set(self, batch: Batch, **values: Any) -> None:
        """Commit a change of state."""
        names = ", ".join(f"{name} = ?" for name in values)
        self.ledger.record([(f"UPDATE batch SET {names} WHERE id = ?", (*values.values(), batch.id))])

    def requests(self, batch: Batch) -> list[Request]:
        """Return what a batch is made of, in the order of its file."""
        return self._members(batch, "")

    def unanswered(self, batch: Batch) -> list[Request]:
        """Return the requests of a batch that have neither a result nor a refusal for good."""
        return self._members(
            batch,
            """AND NOT EXISTS (SELECT 1 FROM response p WHERE p.request = r.id)
            AND NOT EXISTS (SELECT 1 FROM failure f WHERE f.request = r.id AND f.permanent)""",
        )

    def _members(self, batch: Batch, condition: str) -> list[Request]:
        rows = self.ledger.all(
            f"""SELECT {REQUEST} FROM batch_item bi JOIN request r ON r.id = bi.request
            WHERE bi.batch = ? {condition} ORDER BY r.id""", batch.id,
        )  # fmt: skip
        return [Request(*row) for row in rows]

    def answered(self, batch: Batch) -> int:
        """Return how many requests of a batch have a result."""
        query = "SELECT count(*) FROM batch_item bi JOIN response p ON p.request = bi.request WHERE bi.batch = ?"
        return int(self.ledger.one(query, batch.id)[0])

    def knows(self, batch_id: str) -> bool:
        """Whether a batch of the server is one of the ledger, of whatever task."""
        return self.ledger.one("SELECT 1 FROM batch WHERE batch_id = ?", batch_id) is not None

    def last_word(self, request: Request) -> tuple[int | None, str, str]:
        """Return (status, code, message) of the last attempt of a request."""
        query = "SELECT status, code, note FROM attempt WHERE request = ? ORDER BY time DESC, rowid DESC LIMIT 1"
        status, code, note = self.ledger.one(query, request.id) or (
            None, "no_result", "the batch ended without a word about this request",
        )  # fmt: skip
        return status, code, note or ""
