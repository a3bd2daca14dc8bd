"""Batches of Gemini: a file of requests is uploaded, a batch is made of it under a name of ours, a file comes back.

Sources: ai.google.dev/api/batch-api, ai.google.dev/api/files; google-genai 3.6.1, batches.py and files.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from posttrain.synth.ledger.replies import parsed
from posttrain.synth.sending.batches.api import BatchAPI
from posttrain.synth.sending.batches.service import Lost, Missing, Remote
from posttrain.synth.sending.wires.gemini import from_wire, to_wire
from posttrain.synth.sending.wires.parts import count, object_of

STATES = {
    "UNSPECIFIED": "validating", "QUEUED": "validating", "PENDING": "validating", "RUNNING": "in_progress",
    "CANCELLING": "cancelling", "SUCCEEDED": "completed", "PARTIALLY_SUCCEEDED": "completed", "FAILED": "failed",
    "CANCELLED": "cancelled", "EXPIRED": "expired",
}  # fmt: skip
RPC = {1: 499, 2: 500, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501, 13: 500,
       14: 503, 15: 500, 16: 401}  # fmt: skip
"""Code of an error inside a file, as gRPC numbers them -> HTTP status."""


class GeminiBatches(BatchAPI):
    """Calls that make and read batches. What stands for a file is its name and its model, which a batch is made for."""

    def upload(self, path: Path) -> str:
        """Upload a batch file in Gemini's form; see `BatchAPI.upload`."""
        translated, model = path.with_suffix(".gemini"), ""
        with open(path, "rb") as file, open(translated, "wb") as out:
            for text in file:
                line = json.loads(text)
                model = line["body"]["model"]
                made = {"key": line["custom_id"], "request": to_wire(line["body"])}
                out.write(json.dumps(made, ensure_ascii=False).encode() + b"\n")
        try:
            return f"{self._brought(path.name, translated)}@{model.removeprefix('models/')}"
        finally:
            translated.unlink()

    def _brought(self, name: str, path: Path) -> str:
        size = path.stat().st_size
        about = {
            "x-goog-upload-protocol": "resumable", "x-goog-upload-command": "start",
            "x-goog-upload-header-content-length": str(size), "x-goog-upload-header-content-type": "application/jsonl",
        }  # fmt: skip
        begun = self._posted(self._beside("upload", "files"), json={"file": {"displayName": name}}, headers=about)
        where = begun.headers.get("x-goog-upload-url")
        if not where:
            raise Lost("the reply does not say where to upload")
        headers = {
            "x-goog-upload-command": "upload, finalize",
            "x-goog-upload-offset": "0",
            "content-length": str(size),
        }
        with open(path, "rb") as file:
            response = self._posted(where, content=iter(lambda: file.read(1 << 20), b""), headers=headers)
        file_name = object_of(object_of(parsed(response.content)).get("file")).get("name")
        if not isinstance(file_name, str):
            raise Lost("the reply is not readable")
        return file_name

    def _beside(self, what: str, path: str) -> str:
        """Return an address of the upload and download services, which stand before the version in the path."""
        base = httpx.URL(self.service.url)
        return str(base.copy_with(raw_path=f"/{what}{base.path.rstrip('/')}/{path}".encode()))

    def uploaded(self, name: str, size: int) -> str | None:
        """Return None: an upload that was lost is made again, which costs nothing; its file goes after two days."""
        return None

    def create(self, file_id: str, endpoint: str, nonce: str) -> Remote:
        """Make a batch; see `BatchAPI.create`."""
        name, _, model = file_id.partition("@")
        batch = {"displayName": f"posttrain-{nonce}", "inputConfig": {"fileName": name}}
        return self._made(remote, f"models/{model}:batchGenerateContent", json={"batch": batch})

    def find(self, file_id: str, nonce: str) -> Remote | None:
        """Return the batch of a name of ours, if there is one."""
        params = {"pageSize": "100"}
        while True:
            page = object_of(self._json("GET", "batches", params))
            for entry in page.get("operations") or []:
                found = remote(entry)
                if found.nonce == nonce:
                    return found
            if not page.get("nextPageToken"):
                return None
            params = {**params, "pageToken": str(page["nextPageToken"])}

    def get(self, batch_id: str) -> Remote:
        """Return a batch; see `BatchAPI.get`."""
        return remote(self._json("GET", batch_id))

    def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled."""
        self._cancelled(f"{batch_id}:cancel")

    def lines(self, file_id: str) -> Iterator[bytes]:
        """Yield the results of a batch as lines of OpenAI's output files."""
        return map(output_line, self._content(self._beside("download", f"{file_id}:download?alt=media")))


def remote(data: Any) -> Remote:
    """Read an operation that is a batch.

    Raises:
        Missing: it is none.
    """
    if not isinstance(data, dict) or not str(data.get("name", "")).startswith("batches/"):
        raise Missing(f"not a batch: {json.dumps(data)[:200]}")
    about, error = object_of(data.get("metadata")), object_of(data.get("error"))
    state = str(about.get("state") or data.get("state") or "UNSPECIFIED")
    status = STATES.get(state.removeprefix("BATCH_STATE_").removeprefix("JOB_STATE_"), "in_progress")
    output = object_of(about.get("output")) or object_of(data.get("response")) or object_of(data.get("output"))
    stats = object_of(about.get("batchStats"))
    named = str(about.get("displayName") or "")
    return Remote(
        id=data["name"], status="failed" if error and status != "cancelled" else status, input_file_id=None,
        output_file_id=output.get("responsesFile") or None, error_file_id=None,
        completed=number(stats.get("successfulRequestCount")), failed=number(stats.get("failedRequestCount")),
        errors=[{"code": error.get("status") or error.get("code"), "message": error.get("message")}] if error else [],
        nonce=named.removeprefix("posttrain-") if named.startswith("posttrain-") else None,
    )  # fmt: skip


def output_line(line: bytes) -> bytes:
    """Return a line of results as one of OpenAI's output file; what is not readable stays as it is."""
    data = parsed(line)
    if not isinstance(data, dict) or "key" not in data:
        return line
    if isinstance(data.get("response"), dict):
        body = from_wire(data["response"])
        response = {"status_code": 200, "request_id": data["response"].get("responseId"), "body": body}
    else:
        error = object_of(data.get("error")) or object_of(data.get("status"))
        code = error.get("code")
        status = RPC.get(code, code) if isinstance(code, int) else 500
        response = {"status_code": status if 400 <= status < 600 else 500, "request_id": None, "body": {"error": error}}
    return json.dumps({"custom_id": data["key"], "response": response, "error": None}).encode()


def number(value: Any) -> int:
    """Return a count, which Google writes as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else count(value)
