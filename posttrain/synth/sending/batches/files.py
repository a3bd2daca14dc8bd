"""Batch files: what is to be sent, one model and endpoint each, within the provider's limits.

A file stays until what it brought is taken in. One that is gone or was changed is written again from the ledger.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path

from posttrain.synth.ledger.batches import Batch, Batches
from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.batches.service import BatchService


class BatchFiles:
    """Those of one run."""

    def __init__(self, service: BatchService, session: Session, batches: Batches) -> None:
        self.service, self.session, self.batches = service, session, batches
        self.folder = session.ledger.folder / "batches"
        self.max_lines = service.max_lines
        """Lines of a file at most; fewer once a server has found that a batch is more than may wait there."""
        self._held: Request | None = None
        """Read from the ledger, but too much for the file that was being written."""

    def plan(self) -> int:
        """Write what is to be sent into files, one model each; return how many batches that makes."""
        made = 0
        for endpoint, model in sorted(
            {key for key, _ in groupby(self.session.todo(), lambda r: (r.endpoint, r.model))}
        ):
            wanted = (r for r in self.session.todo() if (r.endpoint, r.model) == (endpoint, model))
            while self._write(wanted, endpoint, model):
                made += 1
        return made

    def _write(self, wanted: Iterator[Request], endpoint: str, model: str) -> bool:
        """Write one file and commit it as a batch; false if there was nothing left to write."""
        nonce = uuid.uuid4().hex
        path = self.path(nonce)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft, size, digest = path.with_suffix(".part"), 0, hashlib.sha256()
        members: list[int] = []
        with open(draft, "wb") as file:
            for request in chain([self._held] if self._held else [], wanted):
                line, self._held = self._line(request), None
                full = len(members) >= self.max_lines or size + len(line) > self.service.max_bytes
                if members and full:
                    self._held = request
                    break
                file.write(line)
                digest.update(line)
                size += len(line)
                members.append(request.id)
                self.session.budget.reserve(request)
            file.flush()
            os.fsync(file.fileno())
        if not members:
            draft.unlink()
            return False
        draft.rename(path)
        self.batches.add(nonce, endpoint, model, members, size, digest.hexdigest())
        return True

    def _line(self, request: Request) -> bytes:
        head = {"custom_id": request.custom_id, "method": "POST", "url": self.service.line_prefix + request.endpoint}
        return json.dumps(head)[:-1].encode() + b', "body": ' + request.body + b"}\n"

    def path(self, nonce: str) -> Path:
        """Return where the file of a batch lies."""
        return self.folder / f"posttrain-{nonce}.jsonl"

    def whole(self, batch: Batch) -> Path:
        """Return the file of a batch, written again from the ledger if it is gone or was changed."""
        path = self.path(batch.nonce)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == batch.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(map(self._line, self.batches.requests(batch))))
        return path
