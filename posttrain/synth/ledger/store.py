"""The ledger: every request, reply, failure and batch of one folder, in one SQLite file.

A reply exists if and only if its row is committed. So running anything again is a look-up, and results are a left
join of what was asked with what came: as many as the inputs, in their order, always.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from posttrain.errors import SynthError
from posttrain.synth.ledger.database import Database
from posttrain.synth.ledger.keys import Request, sample_key
from posttrain.synth.ledger.replies import whole

CHUNK = 512
OPEN = """NOT EXISTS (SELECT 1 FROM response p WHERE p.request = i.request)
    AND NOT EXISTS (SELECT 1 FROM failure f WHERE f.request = i.request AND f.permanent)"""
WAITING = """EXISTS (SELECT 1 FROM batch_item bi JOIN batch b ON b.id = bi.batch
    WHERE bi.request = i.request AND b.state <> 'ingested')"""
REQUEST = "r.id, r.key, r.endpoint, r.model, r.body, r.tokens, r.reserve"


class Ledger(Database):
    """Tasks, their requests, and what came of them."""

    def task(self, name: str) -> int:
        """Return the number of a task, made if need be."""
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO task(name) VALUES (?)", (name,))
        return self.find(name)

    def add(self, task: int, start: int, rows: Iterable[tuple[Any, ...]]) -> None:
        """Put requests at the positions of a task from `start` on.

        Args:
            task: its number.
            start: the first position; 0 begins the task again, as far as counting samples goes.
            rows: (content hash, the one that version 0.1 gave it or None, endpoint, model, body, prompt tokens,
                reply tokens, what to keep beside the result).
        """
        with self.transaction() as db:
            if start == 0:
                db.execute("DELETE FROM seen WHERE task = ?", (task,))
            for pos, (content, older, endpoint, model, body, tokens, reserve, extra) in enumerate(rows, start):
                (n,) = db.execute(
                    "INSERT INTO seen VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1 RETURNING n", (task, content)
                ).fetchone()
                key = sample_key(content, n - 1)
                find = "SELECT id FROM request WHERE key = ?"
                found = db.execute(find, (key,)).fetchone()
                if found is None and older is not None:
                    found = db.execute(find, (sample_key(older, n - 1),)).fetchone()
                request = found[0] if found else db.execute(
                    "INSERT INTO request(key, endpoint, model, body, tokens, reserve) VALUES (?, ?, ?, ?, ?, ?)",
                    (key, endpoint, model, body, tokens, reserve),
                ).lastrowid  # fmt: skip
                db.execute("INSERT OR REPLACE INTO item VALUES (?, ?, ?, ?)", (task, pos, request, extra))

    def truncate(self, task: int, length: int) -> None:
        """Forget positions from `length` on: an earlier run of the script had added more."""
        with self.transaction() as db:
            db.execute("DELETE FROM item WHERE task = ? AND pos >= ?", (task, length))

    # -- reading ----------------------------------------------------------------------

    def find(self, name: str) -> int:
        """Return the number of a task.

        Raises:
            SynthError: there is no such task.
        """
        row = self.one("SELECT id FROM task WHERE name = ?", name)
        if row is None:
            known = ", ".join(repr(n) for n in self.tasks()) or "none yet"
            raise SynthError(f"{self.folder} holds no task {name!r} (tasks: {known}); add requests to it first")
        return int(row[0])

    def tasks(self) -> list[str]:
        """Return the names of all tasks."""
        return [name for (name,) in self.all("SELECT name FROM task ORDER BY id")]

    def pages(self, query: str, task: int) -> Iterator[Any]:
        """Yield the rows of a query by position, page by page; the query's first column is the position."""
        last = -1
        while rows := self.all(f"{query} ORDER BY i.pos LIMIT {CHUNK}", task, last):
            yield from rows
            last = rows[-1][0]

    def todo(self, task: int) -> Iterator[Request]:
        """Yield what has to be sent: no result, not refused for good, not in an open batch."""
        query = f"""SELECT i.pos, {REQUEST} FROM item i JOIN request r ON r.id = i.request
            WHERE i.task = ? AND i.pos > ? AND {OPEN} AND NOT {WAITING}"""
        return (Request(*row[1:]) for row in self.pages(query, task))

    def spread(self, task: int, count: int) -> list[Request]:
        """Return up to so many requests that have to be sent, evenly spread, the last one included."""
        (last,) = self.one("SELECT coalesce(max(pos), 0) FROM item WHERE task = ?", task)
        query = f"""SELECT {REQUEST} FROM item i JOIN request r ON r.id = i.request
            WHERE i.task = ? AND i.pos <= ? AND {OPEN} AND NOT {WAITING} ORDER BY i.pos DESC LIMIT 1"""
        found = (self.one(query, task, last * (n + 1) // count) for n in range(count))
        return list({row[0]: Request(*row) for row in found if row}.values())

    def results(self, task: int) -> Iterator[Any]:
        """Yield (pos, endpoint, model, request body, extra, reply, request id, status, code, message, request id of
        the failure, time, cost_micros, finish, waiting) in order: one row per item, whatever became of it."""
        query = f"""SELECT i.pos, r.endpoint, r.model, r.body, i.extra, p.body, p.request_id, f.status, f.code,
                f.message, f.request_id, p.time, p.cost_micros, p.finish, p.body IS NULL AND {WAITING}
            FROM item i JOIN request r ON r.id = i.request LEFT JOIN response p ON p.request = i.request
                LEFT JOIN failure f ON f.request = i.request
            WHERE i.task = ? AND i.pos > ?"""
        return self.pages(query, task)

    def forgive(self, task: int) -> None:
        """Let the next run send again what was refused for good, and what version 0.1 kept and nobody can read."""
        halves = """SELECT p.request, p.body FROM item i JOIN response p ON p.request = i.request
            WHERE i.task = ? AND (instr(p.body, '\\ud') OR instr(p.body, '\\uD') OR instr(p.body, x'ED'))"""
        with self.transaction() as db:
            broken = [(request,) for request, body in db.execute(halves, (task,)) if not whole(json.loads(body))]
            db.executemany("DELETE FROM response WHERE request = ?", broken)
            db.execute(
                "UPDATE failure SET permanent = 0 WHERE request IN (SELECT request FROM item WHERE task = ?)", (task,)
            )
