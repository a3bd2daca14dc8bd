"""Batches of Anthropic: made of requests and not of a file, and without a mark of ours.

Source: docs.anthropic.com, api/creating-message-batches.
"""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.replies import parsed
from posttrain.synth.sending.batches.api import BatchAPI
from posttrain.synth.sending.batches.service import Missing, Remote
from posttrain.synth.sending.wires.anthropic import from_wire, to_wire
from posttrain.synth.sending.wires.parts import object_of

ENDS = {"in_progress": "in_progress", "canceling": "cancelling", "ended": "completed"}
SKEW = 120
"""Seconds that clocks may differ."""


class MessageBatches(BatchAPI):
    """Calls that make and read batches.

    One whose reply was lost is known by when it was made and how many requests it holds.
    """

    def upload(self, path: Path) -> str:
        """Return what stands for the file, which stays here: its name, its lines, and when this was."""
        with open(path, "rb") as file:
            lines = sum(1 for _ in file)
        return f"{path.name}:{lines}:{time.time():.0f}"

    def uploaded(self, name: str, size: int) -> str | None:
        """Return None: there is nothing to look for."""
        return None

    def create(self, file_id: str, endpoint: str, nonce: str) -> Remote:
        """Make a batch; see `BatchAPI.create`."""
        path = self.folder / file_id.rpartition(":")[0].rpartition(":")[0]
        size = sum(map(len, _requests(path)))
        headers = {"content-type": "application/json", "content-length": str(size)}
        return self._made(self._remote, "messages/batches", content=_requests(path), headers=headers)

    def find(self, file_id: str, nonce: str) -> Remote | None:
        """Return the one batch that a lost call can have made.

        Raises:
            TaskStopped: there are several.
        """
        _, lines, since = file_id.rsplit(":", 2)
        found = []
        for entry in self._listed("messages/batches", {"limit": "100"}):
            made = _seconds(entry.get("created_at"))
            if made is not None and made < float(since) - SKEW:
                break  # the newest come first
            counts = entry.get("request_counts") or {}
            if sum(counts.values()) == int(lines) and not self.known(str(entry.get("id"))):
                found.append(self._remote(entry))
        if len(found) > 1:
            ids = ", ".join(batch.id for batch in found)
            raise TaskStopped(
                f"the reply to the call that makes a batch of {lines} requests was lost, and it can be any of {ids}: "
                "cancel those that are not yours at the provider, or wait until they are gone, and run again"
            )
        return found[0] if found else None

    def get(self, batch_id: str) -> Remote:
        """Return a batch; see `BatchAPI.get`."""
        return self._remote(self._json("GET", f"messages/batches/{batch_id}"))

    def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled."""
        self._cancelled(f"messages/batches/{batch_id}/cancel")

    def lines(self, file_id: str) -> Iterator[bytes]:
        """Yield the results of a batch as lines of OpenAI's output files."""
        return map(output_line, self._content(f"messages/batches/{file_id}/results"))

    def _remote(self, data: Any) -> Remote:
        if not isinstance(data, dict) or not isinstance(data.get("id"), str) or "processing_status" not in data:
            raise Missing(f"not a batch: {json.dumps(data)[:200]}")
        counts = data.get("request_counts") or {}
        status = ENDS.get(str(data["processing_status"]), str(data["processing_status"]))
        if status == "completed" and data.get("cancel_initiated_at"):
            status = "cancelled"
        return Remote(
            id=data["id"], status=status, input_file_id=None,
            output_file_id=data["id"] if status in ("completed", "cancelled") else None, error_file_id=None,
            completed=int(counts.get("succeeded") or 0), failed=int(counts.get("errored") or 0), errors=[], nonce=None,
        )  # fmt: skip

    def _next_page(self, params: dict[str, str], last: str) -> dict[str, str]:
        return {**params, "after_id": last}


def _requests(path: Path) -> Iterator[bytes]:
    """Yield the body of the call that makes a batch of the lines of a file."""
    yield b'{"requests": ['
    with open(path, "rb") as file:
        for number, text in enumerate(file):
            line = json.loads(text)
            made = {"custom_id": line["custom_id"], "params": to_wire(line["body"])}
            yield (b", " if number else b"") + json.dumps(made, ensure_ascii=False).encode()
    yield b"]}"


def output_line(line: bytes) -> bytes:
    """Return a line of results as one of OpenAI's output file; what is not readable stays as it is."""
    data = parsed(line)
    result = data.get("result") if isinstance(data, dict) else None
    if not isinstance(result, dict):
        return line
    kind, response, error = result.get("type"), None, None
    if kind == "succeeded":
        response = {"status_code": 200, "request_id": None, "body": from_wire(result.get("message"))}
    elif kind == "errored":
        said = object_of(result.get("error"))
        inner = object_of(said.get("error")) or said
        status = 400 if inner.get("type") == "invalid_request_error" else 500
        response = {"status_code": status, "request_id": said.get("request_id"), "body": {"error": inner}}
    else:
        error = {"code": f"batch_{kind}", "message": f"the request has {kind} in its batch"}
    return json.dumps({"custom_id": data.get("custom_id"), "response": response, "error": error}).encode()


def _seconds(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
