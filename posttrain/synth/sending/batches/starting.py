"""From a file to a batch that runs, without ever paying twice.

A batch is made from a file of its own, so that a lost reply or a crash while creating it can be looked up by the id
of that file. The intent is committed before the call.
"""

import logging

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.batches import Batch, Batches
from posttrain.synth.ledger.replies import Action, Verdict
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.batches.api import BatchAPI
from posttrain.synth.sending.batches.files import BatchFiles
from posttrain.synth.sending.batches.service import BatchService, Lost, Refused, Remote
from posttrain.synth.sending.silence import NoServer

log = logging.getLogger("posttrain.synth")
UPLOADS, CREATIONS = 8, 6
"""How often each is tried."""
ENQUEUED = "token_limit_exceeded"
"""Code of a batch for which the provider's queue has no room now."""


class Starter:
    """Uploads files and makes batches of them."""

    def __init__(
        self, service: BatchService, session: Session, batches: Batches, files: BatchFiles, api: BatchAPI
    ) -> None:
        self.service, self.session, self.batches, self.files, self.api = service, session, batches, files, api

    # -- planned, uploading -----------------------------------------------------------

    def upload(self) -> None:
        """Upload the files of planned batches; a lost reply is looked up by the file's name."""
        for batch in self.batches.open("planned", "uploading"):
            path = self.files.whole(batch)
            file_id = self.api.uploaded(path.name, batch.bytes) if batch.state == "uploading" else None
            self.batches.set(batch, state="uploading")
            tries = 0
            while file_id is None:
                try:
                    file_id = self.api.upload(path)
                except (Lost, Refused) as error:
                    if isinstance(error, Refused) and error.said.action is not Action.WAIT:
                        raise self._stopped(error.said, f"upload of {path.name}") from None
                    tries += 1
                    if tries >= UPLOADS:
                        raise TaskStopped(
                            f"the upload of {path} failed {tries} times: {error}; run again to go on"
                        ) from None
                    self.api.pause(min(30.0, 0.5 * 2**tries))
                    file_id = self.api.uploaded(path.name, batch.bytes)
            self.batches.set(batch, state="uploaded", file_id=file_id)

    # -- uploaded, creating -----------------------------------------------------------

    def submit(self) -> None:
        """Make batches of uploaded files. The intent is committed first; then it is looked up, or made, once."""
        for batch in self.batches.open("creating"):
            if not self.found(batch):
                self.batches.set(batch, state="uploaded")
        for batch in self.batches.open("uploaded"):
            if not self._create(batch):
                return

    def found(self, batch: Batch) -> bool:
        """Look for what a lost call has made; false only if two listings some time apart do not show it."""
        assert batch.file_id is not None
        found = self.api.find(batch.file_id, batch.nonce)
        if found is None:
            self.api.pause(self.service.reconcile_after)
            found = self.api.find(batch.file_id, batch.nonce)
        if found is None:
            return False
        self._submitted(batch, found)
        return True

    def _create(self, batch: Batch) -> bool:
        """Create one batch; false if the server has no room for it now."""
        assert batch.file_id is not None
        for attempt in range(CREATIONS):
            self.batches.set(batch, state="creating")
            try:
                self._submitted(batch, self.api.create(batch.file_id, batch.endpoint, batch.nonce))
                return True
            except Lost as lost:
                log.warning("the reply to a call that makes a batch was lost (%s); looking for it", lost)
                if self.found(batch):
                    return True
                self.batches.set(batch, state="uploaded")
                self.api.pause(min(30.0, 0.5 * 2**attempt))
            except (Refused, NoServer) as error:
                self.batches.set(batch, state="uploaded")
                if isinstance(error, NoServer):
                    raise
                if ENQUEUED in f"{error.said.code} {error.said.message}" and self.batches.open("submitted"):
                    return False
                self._wait_or_stop(error.said, attempt)
        raise TaskStopped(f"a batch could not be made in {CREATIONS} attempts; everything is kept, run again to go on")

    def _wait_or_stop(self, said: Verdict, attempt: int) -> None:
        """Wait after a refusal that time may lift; stop for any other."""
        full = ENQUEUED in f"{said.code} {said.message}"
        early = said.status == 400 and "annot find file" in said.message  # it was uploaded a moment ago
        if not (full or early or said.action is Action.WAIT):
            raise self._stopped(said, "the batch")
        wait = self.api.patient(said.wait or 0.0, said.message)
        self.api.pause(max(wait, self.service.poll_every / 12 * 2**attempt))

    def _submitted(self, batch: Batch, made: Remote) -> None:
        self.batches.set(batch, state="submitted", batch_id=made.id, status=made.status)
        log.info("batch %s: %s, %d requests", made.id, made.status, batch.lines)

    def _stopped(self, said: Verdict, what: str) -> TaskStopped:
        return TaskStopped(f"{what}: {self.session.stop_message(said)}")
