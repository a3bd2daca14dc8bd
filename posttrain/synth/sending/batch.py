"""Batches as a state machine in the ledger: every state is committed before the step that leaves it.

planned -> uploading -> uploaded -> creating -> submitted -> terminal -> ingested

A batch is made from a file of its own, so that a lost reply or a crash while creating it can be looked up by the id
of that file. Whatever a batch ends as, both of its files are taken in, and only what is still missing is planned again.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import attrs
import httpx

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.ingest import Ingest, Truncated
from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.replies import Action, Verdict, parsed
from posttrain.synth.ledger.session import Session
from posttrain.synth.ledger.store import REQUEST
from posttrain.synth.sending.batch_api import (
    TERMINAL,
    BatchAPI,
    BatchService,
    Interrupted,
    Lost,
    Missing,
    Refused,
    Remote,
)

log = logging.getLogger("posttrain.synth")
DOWNLOADS = 5
ENQUEUED = "token_limit_exceeded"
ASKED = "cancelled_by_posttrain"
"""Stands among the errors of a batch that we asked to be cancelled: what is left of it may be sent again."""


@attrs.frozen
class Batch:
    """One batch of the ledger."""

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


class BatchRun:
    """Batches of one task."""

    def __init__(self, service: BatchService, session: Session) -> None:
        self.service, self.session, self.ledger = service, session, session.ledger
        known = lambda name: self.ledger.one("SELECT 1 FROM batch WHERE batch_id = ?", name) is not None  # noqa: E731
        kind = service.api or BatchAPI
        self.api = kind(service, session.scrubber, session.stopping, self.ledger.folder / "batches", known)
        self.max_lines = service.max_lines
        self._held: Request | None = None
        """Read from the ledger, but too much for the file that was being written."""

    def run(self) -> None:
        """Bring the task to its end: plan, drive, ingest, and plan the rest.

        Raises:
            TaskStopped: something concerns the whole task.
        """
        try:
            for _ in range(self.service.max_rounds):
                self.drive()  # what an earlier run left comes first: it may leave less to plan
                if not self.session.wait and self.open():
                    return
                if not self.plan():
                    return
            self.drive()
            self.give_up()
        except Interrupted:
            return
        finally:
            self.api.close()

    def drive(self) -> None:
        """Take every open batch as far as it goes now; with `wait`, until all are ingested."""
        while True:
            self.upload()
            self.submit()
            if not self.session.wait:
                self.poll()
                self.ingest()
                return
            self.poll()
            self.ingest()
            if not self.open():
                return
            if not self.open("planned", "uploading", "uploaded", "creating"):
                self.api.pause(self.service.poll_every)

    # -- planned ----------------------------------------------------------------------

    def plan(self) -> int:
        """Write what is to be sent into files, one model each; return how many batches that makes."""
        made = 0
        for endpoint, model in self._groups():
            wanted = (r for r in self.session.todo() if (r.endpoint, r.model) == (endpoint, model))
            while self._write(wanted, endpoint, model):
                made += 1
        return made

    def _groups(self) -> list[tuple[str, str]]:
        return sorted({key for key, _ in groupby(self.session.todo(), lambda r: (r.endpoint, r.model))})

    def _write(self, wanted: Iterator[Request], endpoint: str, model: str) -> bool:
        """Write one file and commit it as a batch; false if there was nothing left to write."""
        nonce = uuid.uuid4().hex
        path = self._path(nonce)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft, size, lines, digest = path.with_suffix(".part"), 0, 0, hashlib.sha256()
        members: list[int] = []
        with open(draft, "wb") as file:
            for request in chain([self._held] if self._held else [], wanted):
                line, self._held = self._line(request), None
                if lines >= self.max_lines or (lines and size + len(line) > self.service.max_bytes):
                    self._held = request
                    break
                file.write(line)
                digest.update(line)
                size, lines = size + len(line), lines + 1
                members.append(request.id)
                self.session.budget.reserve(request)
            file.flush()
            os.fsync(file.fileno())
        if not lines:
            draft.unlink()
            return False
        draft.rename(path)
        with self.ledger.transaction() as db:
            row = (self.session.task, nonce, endpoint, model, lines, size, digest.hexdigest(), time.time())
            batch = db.execute(
                "INSERT INTO batch(task, nonce, state, endpoint, model, lines, bytes, sha256, created) "
                "VALUES (?, ?, 'planned', ?, ?, ?, ?, ?, ?)", row,
            ).lastrowid  # fmt: skip
            db.executemany("INSERT INTO batch_item VALUES (?, ?)", ((member, batch) for member in members))
        return True

    def _line(self, request: Request) -> bytes:
        head = {"custom_id": request.custom_id, "method": "POST", "url": self.service.line_prefix + request.endpoint}
        return json.dumps(head)[:-1].encode() + b', "body": ' + request.body + b"}\n"

    def _path(self, nonce: str) -> Path:
        return self.ledger.folder / "batches" / f"posttrain-{nonce}.jsonl"

    def _file(self, batch: Batch) -> Path:
        """Return the file of a batch, written again from the ledger if it is gone or was changed."""
        path = self._path(batch.nonce)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == batch.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.ledger.all(
            f"SELECT {REQUEST} FROM batch_item bi JOIN request r ON r.id = bi.request WHERE bi.batch = ? ORDER BY r.id",
            batch.id,
        )
        path.write_bytes(b"".join(self._line(Request(*row)) for row in rows))
        return path

    # -- uploading, uploaded, creating ------------------------------------------------

    def upload(self) -> None:
        """Upload the files of planned batches; a lost reply is looked up by the file's name."""
        for batch in self.open("planned", "uploading"):
            path = self._file(batch)
            file_id = self.api.uploaded(path.name, batch.bytes) if batch.state == "uploading" else None
            self._set(batch, state="uploading")
            tries = 0
            while file_id is None:
                try:
                    file_id = self.api.upload(path)
                except Lost as error:
                    tries += 1
                    if tries >= 8:
                        raise TaskStopped(
                            f"the upload of {path} failed {tries} times: {error}; run again to go on"
                        ) from None
                    self.api.pause(min(30.0, 0.5 * 2**tries))
                    file_id = self.api.uploaded(path.name, batch.bytes)
                except Refused as refusal:
                    raise self._stopped(refusal.said, f"upload of {path.name}") from None
            self._set(batch, state="uploaded", file_id=file_id)

    def submit(self) -> None:
        """Make batches of uploaded files. The intent is committed first; then it is looked up, or made, once."""
        for batch in self.open("creating"):
            found = self._look_up(batch)
            if found is None:
                self._set(batch, state="uploaded")
            else:
                self._submitted(batch, found)
        for batch in self.open("uploaded"):
            if not self._create(batch):
                return

    def _create(self, batch: Batch) -> bool:
        """Create one batch; false if the server has no room for it now."""
        assert batch.file_id is not None
        for attempt in range(6):
            self._set(batch, state="creating")
            try:
                self._submitted(batch, self.api.create(batch.file_id, batch.endpoint, batch.nonce))
                return True
            except Lost as lost:
                log.warning("the reply to a call that makes a batch was lost (%s); looking for it", lost)
                found = self._look_up(batch)
                if found is not None:
                    self._submitted(batch, found)
                    return True
            except (httpx.ConnectError, httpx.ConnectTimeout):
                pass
            except Refused as refusal:
                said = refusal.said
                full = ENQUEUED in f"{said.code} {said.message}"
                early = said.status == 400 and "annot find file" in said.message  # it was uploaded a moment ago
                if not (full or early or said.action is Action.WAIT):
                    self._set(batch, state="uploaded")
                    raise self._stopped(said, "the batch") from None
                if full and self.open("submitted"):
                    self._set(batch, state="uploaded")
                    return False
                self._set(batch, state="uploaded")
                wait = self.api.patient(said.wait or 0.0, said.message)
                self.api.pause(max(wait, self.service.poll_every / 12 * 2**attempt))
                continue
            self._set(batch, state="uploaded")
            self.api.pause(min(30.0, 0.5 * 2**attempt))
        raise TaskStopped("a batch could not be made in 6 attempts; everything is kept, run again to go on")

    def _look_up(self, batch: Batch) -> Remote | None:
        """Return the batch that a lost call made; None only if two listings some time apart do not show it."""
        assert batch.file_id is not None
        found = self.api.find(batch.file_id, batch.nonce)
        if found is None:
            self.api.pause(self.service.reconcile_after)
            found = self.api.find(batch.file_id, batch.nonce)
        return found

    def _submitted(self, batch: Batch, found: Remote) -> None:
        self._set(batch, state="submitted", batch_id=found.id, status=found.status)
        log.info("batch %s: %s, %d requests", found.id, found.status, batch.lines)

    # -- submitted, terminal ----------------------------------------------------------

    def poll(self) -> None:
        """Ask for every submitted batch how it stands."""
        for batch in self.open("submitted"):
            assert batch.batch_id is not None
            try:
                found = self._seen(batch.batch_id)
            except Missing:
                self._vanished(batch)
                continue
            over, told = found.status in TERMINAL, [*found.errors, *([{"code": ASKED}] if batch.asked else [])]
            self._set(
                batch, state="terminal" if over else "submitted", status=found.status, completed=found.completed,
                output_file_id=found.output_file_id, error_file_id=found.error_file_id, errors=json.dumps(told),
            )  # fmt: skip
            self.session.progress.note = f"batch {found.id}: {found.status}, {found.completed} done"
            self.session.report(self.session.progress)

    def _seen(self, batch_id: str) -> Remote:
        for attempt in range(3):
            try:
                return self.api.get(batch_id)
            except Missing:
                if attempt == 2:
                    raise
                self.api.pause(min(self.service.poll_every, 10))
        raise AssertionError

    def _vanished(self, batch: Batch) -> None:
        """The server has forgotten a batch that may have been paid: never send it again without being asked to."""
        self._left(batch, "batch_vanished", f"batch {batch.batch_id} is not known to the server any more")
        self._set(batch, state="ingested", status="vanished")

    def _left(self, batch: Batch, code: str, what: str) -> None:
        """Give up what a batch has brought no answer to; it is sent again only when that is asked for."""
        said = Verdict(Action.REFUSED, code, f"{what}; retry_failed=True (--retry-failed) sends it again")
        with self.ledger.transaction() as db:
            for request in self._unanswered(batch):
                for statement, values in self.session.failure(request, said, permanent=True):
                    db.execute(statement, values)

    def _unanswered(self, batch: Batch) -> list[Request]:
        rows = self.ledger.all(
            f"""SELECT {REQUEST} FROM batch_item bi JOIN request r ON r.id = bi.request
            WHERE bi.batch = ? AND NOT EXISTS (SELECT 1 FROM response p WHERE p.request = r.id)
                AND NOT EXISTS (SELECT 1 FROM failure f WHERE f.request = r.id AND f.permanent)""", batch.id,
        )  # fmt: skip
        return [Request(*row) for row in rows]

    def ingest(self) -> None:
        """Take in both files of every batch that is over."""
        for batch in self.open("terminal"):
            for file_id in (batch.output_file_id, batch.error_file_id):
                if file_id:
                    self._download(batch, file_id)
            if batch.status == "cancelled" and not batch.asked:
                self._left(batch, "batch_cancelled", f"batch {batch.batch_id} was cancelled at the provider")
            self._set(batch, state="ingested")
            self.session.budget.under_way(self.ledger.waiting(self.session.task))
            self._path(batch.nonce).unlink(missing_ok=True)
            log.info("batch %s: %s", batch.batch_id, batch.status)
            self._after_failure(batch)

    def _after_failure(self, batch: Batch) -> None:
        """A batch that the server did not accept: wait where that helps, else say why."""
        told: list[dict[str, Any]] = json.loads(batch.errors or "[]") if batch.status == "failed" else []
        errors = [entry for entry in told if entry.get("code") != ASKED]
        codes = {str(entry.get("code")) for entry in errors}
        if ENQUEUED in codes:
            self.max_lines = max(1, batch.lines // 2)
            self.api.pause(self.service.poll_every)
        elif errors:
            answered = "SELECT count(*) FROM batch_item bi JOIN response p ON p.request = bi.request WHERE bi.batch = ?"
            (paid,) = self.ledger.one(answered, batch.id)
            why = "; ".join(
                f"{e.get('code')}" + (f" (line {e['line']})" if e.get("line") else "") + f": {e.get('message')}"
                for e in errors[:5]
            )
            raise TaskStopped(
                f"batch {batch.batch_id} of {batch.lines:,} requests was refused: {self.session.scrubber.text(why)}. "
                + (f"{paid:,} of its lines were answered and are kept" if paid else "None of its lines was answered")
                + "; fix it and run again"
            )

    def _download(self, batch: Batch, file_id: str) -> None:
        """Take in one file; one that breaks off is fetched again from its beginning."""
        for attempt in range(DOWNLOADS):
            ingest = Ingest(self.session, batch.id)
            try:
                self._take(ingest, file_id, last_chance=attempt == DOWNLOADS - 1)
                ingest.commit()
                return
            except (httpx.HTTPError, Missing, Truncated) as error:
                ingest.commit()
                if isinstance(error, Missing) and attempt == DOWNLOADS - 1:
                    what = f"file {file_id} of batch {batch.batch_id} is gone: its answers are paid and lost"
                    self._left(batch, "output_file_gone", what)
                    return
                problem = str(error) or type(error).__name__
                if attempt < DOWNLOADS - 1:
                    self.api.pause(min(10.0, self.service.poll_every) * (attempt > 0))
        raise TaskStopped(
            f"file {file_id} of batch {batch.batch_id} could not be read {DOWNLOADS} times: "
            f"{self.session.scrubber.text(problem)}. What it holds is paid for: run again to fetch it"
        )

    def _take(self, ingest: Ingest, file_id: str, last_chance: bool) -> None:
        previous: bytes | None = None
        for line in self.api.lines(file_id):
            if previous is not None:
                ingest.take(previous)
            previous = line
        if previous and previous.strip() and parsed(previous) is None and not last_chance:
            raise Truncated("its last line is not whole")
        if previous is not None:
            ingest.take(previous)

    def give_up(self) -> None:
        """Say what became of requests that no batch brought to an end; the next run tries them again."""
        for request in self.session.todo():
            last = self.ledger.one(
                "SELECT status, code, note FROM attempt WHERE request = ? ORDER BY time DESC, rowid DESC LIMIT 1",
                request.id,
            ) or (None, "no_result", "the batch ended without a word about this request")
            said = Verdict(Action.RETRY, last[1], last[2] or "", last[0])
            with self.ledger.transaction() as db:
                db.execute(*self.session.failure(request, said, permanent=False)[0])

    # -- helpers ----------------------------------------------------------------------

    def cancel(self) -> list[str]:
        """Cancel what is under way; return the ids of the batches that were asked to end."""
        asked = []
        for batch in self.open("planned", "uploading", "uploaded"):
            self._set(batch, state="ingested", status="cancelled")
        for batch in self.open("creating"):
            found = self._look_up(batch)
            if found is None:
                self._set(batch, state="ingested", status="cancelled")
            else:
                self._submitted(batch, found)
        for batch in self.open("submitted"):
            self._set(batch, errors=json.dumps([{"code": ASKED}]))
            self.api.cancel(str(batch.batch_id))
            asked.append(str(batch.batch_id))
        return asked

    def open(self, *states: str) -> list[Batch]:
        """Return the task's batches in some states, or all that are not ingested."""
        wanted = states or ("planned", "uploading", "uploaded", "creating", "submitted", "terminal")
        marks = ", ".join("?" * len(wanted))
        rows = self.ledger.all(
            f"""SELECT {COLUMNS} FROM batch b WHERE state IN ({marks}) AND (task = ? OR EXISTS (SELECT 1
                FROM batch_item bi JOIN item i ON i.request = bi.request WHERE bi.batch = b.id AND i.task = ?))
            ORDER BY id""", *wanted, self.session.task, self.session.task,
        )  # fmt: skip
        return [Batch(*row) for row in rows]

    def _set(self, batch: Batch, **values: Any) -> None:
        """Commit a change of state."""
        names = ", ".join(f"{name} = ?" for name in values)
        with self.ledger.transaction() as db:
            db.execute(f"UPDATE batch SET {names} WHERE id = ?", (*values.values(), batch.id))

    def _stopped(self, said: Verdict, what: str) -> TaskStopped:
        return TaskStopped(f"{what}: {self.session.stop_message(said)}")


def with_batches(service: BatchService, session: Session, work: Callable[[BatchRun], Any]) -> Any:
    """Do one step by hand, and close the connections."""
    run = BatchRun(service, session)
    try:
        return work(run)
    finally:
        run.api.close()
