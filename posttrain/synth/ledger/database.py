"""The SQLite file of a work folder: opened once, locked against other processes, committed as one or not at all."""

import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from posttrain.errors import SynthError

Statement = tuple[str, tuple[Any, ...]]
"""SQL, and its values."""
VERSION = 1
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


class Database:
    """The ledger's file. One process writes it at a time; any number may read it."""

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
    def of(cls, folder: Path) -> Self:
        """Return that of a folder, to write to; clients of one process share it.

        Raises:
            SynthError: another process has it.
        """
        where = folder.resolve()
        with _opening:
            found: Self | None = _open.get(where)
            if found is None:
                found = _open[where] = cls(where)
            return found

    def close(self) -> None:
        """Close the file, and let another process have the folder."""
        with self._lock:
            _open.pop(self.folder, None)
            self._end()

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

    def record(self, statements: Iterable[Statement]) -> None:
        """Commit statements as one."""
        with self.transaction() as db:
            for statement, values in statements:
                db.execute(statement, values)

    def one(self, query: str, *values: Any) -> Any:
        """Return the first row of a query, or None."""
        with self._lock, readable(self.path):
            return self._db.execute(query, values).fetchone()

    def all(self, query: str, *values: Any) -> list[Any]:
        """Return all rows of a query; for few rows only."""
        with self._lock, readable(self.path):
            return self._db.execute(query, values).fetchall()


_open: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()
"""Folder -> what this process has open there."""
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
