"""The Files and Batches endpoints of OpenAI and Azure, with what their answers look like in practice made regular."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.synth.ledger.replies import parsed
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.batches.calls import Calls
from posttrain.synth.sending.batches.service import BatchService, Lost, Missing, Remote


class BatchAPI(Calls):
    """Upload files, make batches of them, see how they stand, read what they brought.

    Other providers' interfaces override what differs.
    """

    def __init__(self, service: BatchService, session: Session, folder: Path, known: Callable[[str], bool]) -> None:
        """`folder` holds the batch files; `known` says whether a batch of the server is in the ledger."""
        super().__init__(service, session)
        self.folder, self.known = folder, known

    def upload(self, path: Path) -> str:
        """Upload a batch file once and return its id.

        Raises:
            Lost: the reply did not come, or is not readable.
            Refused: the server said no.
        """
        with open(path, "rb") as file:
            form = {"purpose": "batch", **self.service.expiry}
            response = self._posted("files", data=form, files={"file": (path.name, file, "application/jsonl")})
        data = parsed(response.content)
        if isinstance(data, dict) and isinstance(data.get("id"), str):
            return str(data["id"])
        raise Lost("the reply is not readable")

    def uploaded(self, name: str, size: int) -> str | None:
        """Return the id of a file that was uploaded under a name, if it is there and whole."""
        for entry in self._listed("files", {"purpose": "batch", "limit": "1000", "order": "desc"}):
            whole = entry.get("bytes") in (None, size) and str(entry.get("status")).lower() != "error"
            if entry.get("filename") == name and whole and isinstance(entry.get("id"), str):
                return str(entry["id"])
        return None

    def create(self, file_id: str, endpoint: str, nonce: str) -> Remote:
        """Make a batch. This is what costs money.

        Raises:
            Lost: the reply did not come or is not readable: look before doing it again.
            Refused: nothing was made.
            NoServer: nothing was sent.
        """
        body = {
            "input_file_id": file_id, "endpoint": self.service.line_prefix + endpoint, "completion_window": "24h",
            "metadata": {"posttrain": nonce},
        }  # fmt: skip
        return self._made(remote, "batches", json=body)

    def find(self, file_id: str, nonce: str) -> Remote | None:
        """Return the batch that was made from a file, if there is one."""
        for entry in self._listed("batches", {"limit": "100"}):
            try:
                batch = remote(entry)
            except Missing:
                continue
            if batch.input_file_id == file_id or batch.nonce == nonce:
                return batch
        return None

    def get(self, batch_id: str) -> Remote:
        """Return a batch.

        Raises:
            Missing: there is none of this id.
        """
        return remote(self._json("GET", f"batches/{batch_id}"))

    def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled; one that is over already is left as it is."""
        self._cancelled(f"batches/{batch_id}/cancel")

    def lines(self, file_id: str) -> Iterator[bytes]:
        """Yield the lines of a file as they come, the last one whole or not; see `Calls._content`."""
        return self._content(f"files/{file_id}/content")


def remote(data: Any) -> Remote:
    """Read a batch object: statuses in any case and both spellings, empty ids, missing counts.

    Raises:
        Missing: it is none.
    """
    if not isinstance(data, dict) or not isinstance(data.get("id"), str) or not data["id"]:
        raise Missing(f"not a batch: {json.dumps(data)[:200]}")
    counts = data.get("request_counts") or {}
    errors = data.get("errors") or {}
    listed = errors.get("data") if isinstance(errors, dict) else errors
    status = str(data.get("status") or "").lower()
    return Remote(
        id=data["id"],
        status={"canceled": "cancelled", "canceling": "cancelling"}.get(status, status),
        input_file_id=data.get("input_file_id") or None,
        output_file_id=data.get("output_file_id") or None,
        error_file_id=data.get("error_file_id") or None,
        completed=int(counts.get("completed") or 0),
        failed=int(counts.get("failed") or 0),
        errors=[entry for entry in listed or [] if isinstance(entry, dict)],
        nonce=(data.get("metadata") or {}).get("posttrain"),
    )
