"""The ledger: every request, reply, failure and batch of one folder, in one SQLite file.

A reply exists if and only if its row is committed. So running anything again is a look-up, and results are a left
join of what was asked with what came: as many as the inputs, in their order, always.
"""

import fcntl
import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.errors import SynthError
from posttrain.synth.ledger.keys import CHAT, LIMITS, Request, sample_key
from posttrain.synth.ledger.replies import whole

VERSION = 1
CHUNK = 512
SCHEMA = """
CREATE TABLE task(id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
CREATE TABLE request(id INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL,
    body BLOB NOT NULL, tokens INTEGER NOT NULL, reserve INTEGER NOT NULL);
CREATE TABLE item(task INTEGER NOT NULL, pos INTEGER NOT NULL, request INTEGER NOT NULL, extra BLOB,
    PRIMARY KEY(task, pos)) WITHOUT ROWID;
CREATE TABLE response(request INTEGER PRIMARY KEY, time REAL NOT NULL, request_id TEXT, body BLOB NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    cost_micros INTEGER, finish TEXT);
CREATE TABLE failure(request INTEGER PRIMARY KEY, time REAL NOT NULL, permanent INTEGER NOT NULL, status INTEGER,
    code TEXT NOT NULL, message TEXT NOT NULL, request_id TEXT);
CREATE TABLE attempt(request INTEGER NOT NULL, time REAL NOT NULL, status INTEGER, code TEXT NOT NULL, note TEXT);
CREATE INDEX attempt_request ON attempt(request);
CREATE TABLE batch(id INTEGER PRIMARY KEY, task INTEGER NOT NULL, nonce TEXT UNIQUE NOT NULL, state TEXT NOT NULL,
    endpoint TEXT NOT NULL, model TEXT NOT NULL, lines INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    file_id TEXT, batch_id TEXT, status TEXT, output_file_id TEXT, error_file_id TEXT, errors TEXT,
    completed INTEGER, created REAL NOT NULL);
CREATE TABLE batch_item(request INTEGER NOT NULL, batch INTEGER NOT NULL, PRIMARY KEY(request, batch)) WITHOUT ROWID;
CREATE INDEX batch_item_batch ON batch_item(batch);
CREATE TABLE stray(batch INTEGER NOT NULL, time REAL NOT NULL, why TEXT NOT NULL, custom_id TEXT, line BLOB NOT NULL);
"""

OPEN = """NOT EXISTS (SELECT 1 FROM response p WHERE p.request = i.request)
    AND NOT EXISTS (SELECT 1 FROM failure f WHERE f.request = i.request AND f.permanent)"""
WAITING = """EXISTS (SELECT 1 FROM batch_item bi JOIN batch b ON b.id = bi.batch
    WHERE bi.request = i.request AND b.state <> 'ingested')"""
REQUEST = "r.id, r.key, r.endpoint, r.model, r.body, r.tokens, r.reserve"


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


class Ledger:
    """The SQLite file of a work folder. One process writes it at a time; any number may read it."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.folder, self.path = folder, folder / "ledger.sqlite"
        self._lock = threading.RLock()
        self._claim: int | None = None
        if read_only and not self.path.exists():
            raise SynthError(f"there is no ledger in {folder}: nothing was run there yet")
        if not read_only:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._claim = claim(folder / "lock")
            except OSError as error:
                raise SynthError(f"the folder {folder} cannot be used: {error.strerror or error}") from None
        try:
            with readable(self.path):
                self._db = connect(self.path)
                if not read_only:
                    self._prepare()
        except BaseException:  # another try of this process must not find the folder taken by itself
            _release(getattr(self, "_db", None), self._claim)
            raise
        self._end = weakref.finalize(self, _release, self._db, self._claim)

    def _prepare(self) -> None:
        with self.transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise SynthError(
                    f"{self.path} has version {version}, and this posttrain writes version {VERSION}: "
                    "use another work_dir, or the posttrain that made it"
                )
        # How often a content came up in a task, while this process adds to it; on disk, so that memory stays flat.
        self._db.execute(
            "CREATE TEMP TABLE seen(task INT, content BLOB, n INT, PRIMARY KEY(task, content)) WITHOUT ROWID"
        )

    @classmethod
    def of(cls, folder: Path) -> "Ledger":
        """Return the ledger of a folder to write to; clients of one process share it.

        Raises:
            SynthError: another process has it.
        """
        where = folder.resolve()
        with _opening:
            ledger = _open.get(where)
            if ledger is None:
                ledger = _open[where] = cls(where)
            return ledger

    def close(self) -> None:
        """Close the file, and let another process have the folder."""
        with self._lock:
            _open.pop(self.folder, None)
            self._end()

    # -- writing ----------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what happens inside as one, or nothing of it.

        Raises:
            SynthError: the disk is full, or the file cannot be written.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._commit()
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise SynthError(
                    f"{self.path} cannot be written: {error}. What was committed before is safe; make room or put the "
                    "disk right, then run the same again"
                ) from error

    def _commit(self) -> None:
        """Everything becomes durable here and nowhere else."""
        self._db.execute("COMMIT")

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

    def one(self, query: str, *values: Any) -> Any:
        """Return the first row of a query, or None."""
        with self._lock, readable(self.path):
            return self._db.execute(query, values).fetchone()

    def all(self, query: str, *values: Any) -> list[Any]:
        """Return all rows of a query; for few rows only."""
        with self._lock, readable(self.path):
            return self._db.execute(query, values).fetchall()

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

    def counts(self, task: int) -> Counts:
        """Return how a task stands."""
        total, done, failed, permanent, waiting, *tokens, micros, unknown = self.one(
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

    def new(self, task: int) -> list[tuple[str, int, int, int]]:
        """Return (model, requests, prompt tokens, reply tokens at most) of what is to be sent, estimated."""
        return self.all(
            f"""SELECT r.model, count(*), sum(r.tokens), sum(r.reserve) FROM item i JOIN request r ON r.id = i.request
            WHERE i.task = ? AND {OPEN} AND NOT {WAITING} GROUP BY r.model ORDER BY r.model""", task,
        )  # fmt: skip

    def usage(self, task: int) -> list[tuple[str, int, int, int]]:
        """Return (model, prompt tokens, reply tokens, cached prompt tokens) that the results of a task have used."""
        return self.all(
            """SELECT r.model, sum(p.input_tokens), sum(p.output_tokens), sum(p.cached_tokens) FROM item i
            JOIN request r ON r.id = i.request JOIN response p ON p.request = r.id WHERE i.task = ? GROUP BY r.model""",
            task,
        )

    def waiting(self, task: int) -> list[tuple[str, int, int, int]]:
        """Return (model, requests, prompt tokens, reply tokens at most) of what is in batches, estimated."""
        return self.all(
            f"""SELECT r.model, count(*), sum(r.tokens), sum(r.reserve) FROM item i JOIN request r ON r.id = i.request
            WHERE i.task = ? AND NOT EXISTS (SELECT 1 FROM response p WHERE p.request = i.request) AND {WAITING}
            GROUP BY r.model""", task,
        )  # fmt: skip

    def unbounded(self, task: int) -> int:
        """Return how many of the chats to be sent set no bound on their reply."""
        no_bound = " AND ".join(f"NOT instr(r.body, CAST('\"{name}\":' AS BLOB))" for name in LIMITS)
        (count,) = self.one(
            f"""SELECT count(*) FROM item i JOIN request r ON r.id = i.request WHERE i.task = ? AND {OPEN}
            AND NOT {WAITING} AND r.endpoint = '{CHAT}' AND {no_bound}""", task,
        )  # fmt: skip
        return int(count)

    def errors(self, task: int) -> list[tuple[str, str, int, int]]:
        """Return (code, message of one of them, how many, how many of them for good) of what has no result."""
        return self.all(
            """SELECT f.code, min(f.message), count(*), sum(f.permanent) FROM item i
                JOIN failure f ON f.request = i.request LEFT JOIN response p ON p.request = i.request
            WHERE i.task = ? AND p.request IS NULL GROUP BY f.code ORDER BY count(*) DESC, f.code""", task,
        )  # fmt: skip

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


_open: "weakref.WeakValueDictionary[Path, Ledger]" = weakref.WeakValueDictionary()
"""Folder -> the ledger that this process has open for it."""
_opening = threading.Lock()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say which ledger could not be read, and what can be done.

    Raises:
        SynthError: the file is damaged, or the disk is full or failing.
    """
    try:
        yield
    except sqlite3.Error as error:
        damaged = "not a database" in str(error) or "malformed" in str(error)
        what = (
            f"it is damaged. `sqlite3 {path} .recover` saves what can be saved; put a copy from a backup in its place, "
            "or use another work_dir"
            if damaged
            else "make room or put the disk right, then run the same again"
        )
        raise SynthError(f"{path} cannot be read: {error}; {what}") from error


def _release(db: sqlite3.Connection | None, claim: int | None) -> None:
    if db is not None:
        db.close()
    if claim is not None:
        os.close(claim)


def connect(path: Path) -> sqlite3.Connection:
    """Open the file so that what is committed survives a power cut."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "temp_store = FILE", "cache_size = -8192"):
        db.execute(f"PRAGMA {pragma}")
    return db


def claim(path: Path) -> int:
    """Make the folder this process's; the operating system gives it back when the process ends, however it ends.

    Raises:
        SynthError: another process has it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise SynthError(
            f"{path.parent} is in use by another process (pid {owner}). Two at once would pay for the same requests "
            "twice: wait for it, end it, or give this one a work_dir of its own"
        ) from None
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    except OSError:
        os.close(handle)
        raise
    return handle


class Writer:
    """One thread that commits what has gathered while it was committing: many replies share one fsync."""

    def __init__(self, ledger: Ledger, done: Callable[[list[Any], Exception | None], None]) -> None:
        """`done(tokens, error)` is called from the thread after each commit, with the tokens of what it held."""
        self._ledger, self._done = ledger, done
        self._waiting: list[tuple[list[tuple[str, tuple[Any, ...]]], Any]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def put(self, statements: list[tuple[str, tuple[Any, ...]]], token: Any) -> None:
        """Hand over statements that belong together."""
        with self._wake:
            self._waiting.append((statements, token))
            self._wake.notify()

    def close(self) -> None:
        """Commit what is left, and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                taken, self._waiting = self._waiting, []
            if not taken:
                return
            error: Exception | None = None
            try:
                with self._ledger.transaction() as db:
                    for statements, _ in taken:
                        for statement, values in statements:
                            db.execute(statement, values)
            except Exception as found:  # whoever waits for these rows raises it
                error = found
            self._done([token for _, token in taken], error)


def extra_of(keep: dict[str, Any] | None) -> bytes | None:
    """Return what a caller wants to find beside a result, as stored."""
    return json.dumps(keep, ensure_ascii=False).encode() if keep else None
