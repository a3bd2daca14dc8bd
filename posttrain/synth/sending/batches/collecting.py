"""From a batch that runs to its results. Whatever it ends as, both of its files are taken in.

What it has paid for and brought is kept; what is missing is planned again, unless the provider may have been paid.
"""

import json
import logging
from typing import Any

import httpx

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger import standing
from posttrain.synth.ledger.batches import ASKED, Batch, Batches
from posttrain.synth.ledger.ingest import Ingest, Truncated
from posttrain.synth.ledger.replies import Action, Verdict, parsed
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.batches.api import BatchAPI
from posttrain.synth.sending.batches.files import BatchFiles
from posttrain.synth.sending.batches.service import TERMINAL, BatchService, Missing, Remote
from posttrain.synth.sending.batches.starting import ENQUEUED

log = logging.getLogger("posttrain.synth")
LOOKS = 3
"""So often a batch must be unknown to the server before it is believed to be gone."""
DOWNLOADS = 5
"""How often a file is fetched."""


class Collector:
    """Looks at batches that run, and takes in what they brought."""

    def __init__(
        self, service: BatchService, session: Session, batches: Batches, files: BatchFiles, api: BatchAPI
    ) -> None:
        self.service, self.session, self.batches, self.files, self.api = service, session, batches, files, api

    # -- submitted --------------------------------------------------------------------

    def poll(self) -> None:
        """Ask for every submitted batch how it stands."""
        for batch in self.batches.open("submitted"):
            assert batch.batch_id is not None
            try:
                found = self._seen(batch.batch_id)
            except Missing:  # it may have been paid: never send it again without being asked to
                self._left(batch, "batch_vanished", f"batch {batch.batch_id} is not known to the server any more")
                self.batches.set(batch, state="ingested", status="vanished")
                continue
            over, told = found.status in TERMINAL, [*found.errors, *([{"code": ASKED}] if batch.asked else [])]
            self.batches.set(
                batch, state="terminal" if over else "submitted", status=found.status, completed=found.completed,
                output_file_id=found.output_file_id, error_file_id=found.error_file_id, errors=json.dumps(told),
            )  # fmt: skip
            self.session.progress.note = f"batch {found.id}: {found.status}, {found.completed} done"
            self.session.report(self.session.progress)

    def _seen(self, batch_id: str) -> Remote:
        for _ in range(LOOKS - 1):
            try:
                return self.api.get(batch_id)
            except Missing:
                self.api.pause(min(self.service.poll_every, 10))
        return self.api.get(batch_id)

    def _left(self, batch: Batch, code: str, what: str) -> None:
        """Give up what a batch has brought no answer to; it is sent again only when that is asked for."""
        said = Verdict(Action.REFUSED, code, f"{what}; retry_failed=True (--retry-failed) sends it again")
        unanswered = self.batches.unanswered(batch)
        self.session.ledger.record(
            statement for request in unanswered for statement in self.session.failure(request, said, permanent=True)
        )

    # -- terminal ---------------------------------------------------------------------

    def ingest(self) -> None:
        """Take in both files of every batch that is over."""
        for batch in self.batches.open("terminal"):
            for file_id in (batch.output_file_id, batch.error_file_id):
                if file_id:
                    self._download(batch, file_id)
            if batch.status == "cancelled" and not batch.asked:
                self._left(batch, "batch_cancelled", f"batch {batch.batch_id} was cancelled at the provider")
            self.batches.set(batch, state="ingested")
            self.session.budget.under_way(standing.in_batches(self.session.ledger, self.session.task))
            self.files.path(batch.nonce).unlink(missing_ok=True)
            log.info("batch %s: %s", batch.batch_id, batch.status)
            self._after_failure(batch)

    def _after_failure(self, batch: Batch) -> None:
        """A batch that the server did not accept: wait where that helps, else say why."""
        told: list[dict[str, Any]] = json.loads(batch.errors or "[]") if batch.status == "failed" else []
        errors = [entry for entry in told if entry.get("code") != ASKED]
        if ENQUEUED in {str(entry.get("code")) for entry in errors}:
            self.files.max_lines = max(1, batch.lines // 2)
            self.api.pause(self.service.poll_every)
        elif errors:
            paid = self.batches.answered(batch)
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
