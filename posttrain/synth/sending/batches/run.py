"""Batches as a state machine in the ledger: every state is committed before the step that leaves it.

planned -> uploading -> uploaded -> creating -> submitted -> terminal -> ingested

Whatever a batch ends as, only what is still missing is planned again.
"""

import json
from collections.abc import Callable
from typing import Any

from posttrain.synth.ledger.batches import ASKED, Batches
from posttrain.synth.ledger.replies import Action, Verdict
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.batches.api import BatchAPI
from posttrain.synth.sending.batches.collecting import Collector
from posttrain.synth.sending.batches.files import BatchFiles
from posttrain.synth.sending.batches.service import BatchService, Interrupted
from posttrain.synth.sending.batches.starting import Starter


class BatchRun:
    """Batches of one task."""

    def __init__(self, service: BatchService, session: Session) -> None:
        self.service, self.session = service, session
        self.batches = Batches(session.ledger, session.task)
        self.files = BatchFiles(service, session, self.batches)
        self.api = (service.api or BatchAPI)(service, session, self.files.folder, self.batches.knows)
        self.starter = Starter(service, session, self.batches, self.files, self.api)
        self.collector = Collector(service, session, self.batches, self.files, self.api)

    def run(self) -> None:
        """Bring the task to its end: plan, drive, ingest, and plan the rest.

        Raises:
            TaskStopped: something concerns the whole task.
        """
        try:
            for _ in range(self.service.max_rounds):
                self.drive()  # what an earlier run left comes first: it may leave less to plan
                if not self.session.wait and self.batches.open():
                    return
                if not self.files.plan():
                    return
            self.drive()
            self.give_up()
        except Interrupted:
            return

    def drive(self) -> None:
        """Take every open batch as far as it goes now; with `wait`, until all are ingested."""
        while True:
            self.starter.upload()
            self.starter.submit()
            self.collector.poll()
            self.collector.ingest()
            if not self.session.wait or not self.batches.open():
                return
            if not self.batches.open("planned", "uploading", "uploaded", "creating"):
                self.api.pause(self.service.poll_every)

    def give_up(self) -> None:
        """Say what became of requests that no batch brought to an end; the next run tries them again."""
        for request in self.session.todo():
            status, code, message = self.batches.last_word(request)
            said = Verdict(Action.RETRY, code, message, status)
            self.session.ledger.record(self.session.failure(request, said, permanent=False)[:1])

    def cancel(self) -> list[str]:
        """Cancel what is under way; return the ids of the batches that were asked to end."""
        asked = []
        for batch in self.batches.open("planned", "uploading", "uploaded", "creating"):
            if batch.state != "creating" or not self.starter.found(batch):
                self.batches.set(batch, state="ingested", status="cancelled")
        for batch in self.batches.open("submitted"):
            self.batches.set(batch, errors=json.dumps([{"code": ASKED}]))
            self.api.cancel(str(batch.batch_id))
            asked.append(str(batch.batch_id))
        return asked


def with_batches(service: BatchService, session: Session, work: Callable[[BatchRun], Any]) -> Any:
    """Do all or one step of a run, and close the connections."""
    run = BatchRun(service, session)
    try:
        return work(run)
    finally:
        run.api.close()
