"""Lines of a batch's output and error files -> the ledger. Doing it twice changes nothing."""

import time
from typing import Any

from posttrain.synth.ledger.database import Statement
from posttrain.synth.ledger.keys import CHAT, Request
from posttrain.synth.ledger.replies import Action, Verdict, parsed, verdict
from posttrain.synth.ledger.session import Session, dumped
from posttrain.synth.ledger.store import REQUEST, Ledger

COMMIT_EVERY = 256
DONE = "done"


class Truncated(Exception):
    """The last line of a file is not whole."""


class Ingest:
    """Takes the lines of one batch, commits them in groups, and never lets one change what is there."""

    def __init__(self, session: Session, batch: int) -> None:
        self.session, self.batch = session, batch
        self._ledger: Ledger = session.ledger
        self._pending: list[Statement] = []
        self._fresh: dict[str, bytes] = {}
        """Results that are not committed yet, by custom_id."""

    def take(self, line: bytes) -> None:
        """Record one line."""
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not line:
            return
        data = parsed(line)
        name = data.get("custom_id") if isinstance(data, dict) else None
        request = self._request(name) if isinstance(name, str) else None
        if request is None:
            self._stray("not readable" if data is None else "unknown custom_id", name, line)
        else:
            self._line(request, str(name), data, line)
        if len(self._pending) >= COMMIT_EVERY:
            self.commit()

    def commit(self) -> None:
        """Make durable what was taken."""
        self._ledger.record(self._pending)
        self._pending.clear()
        self._fresh.clear()
        self.session.report(self.session.progress)

    def _line(self, request: Request, name: str, data: dict[str, Any], line: bytes) -> None:
        response = data.get("response")
        body = response.get("body") if isinstance(response, dict) else None
        said = judged(data, request.endpoint.endswith(CHAT))
        if said.action is not Action.RESULT or not isinstance(body, dict):
            self._pending += self.session.attempt(request, said)
            if said.action is Action.REFUSED:
                self._pending += self.session.failure(request, said, permanent=True)[:1]
            return
        content = dumped(body)
        known = self._fresh.get(name) or self._known(request)
        if known is None:
            self._fresh[name] = content
            self._pending += self.session.result(request, body, content, said.request_id)
        elif known != content:
            self._stray("another result for the same request", name, line)

    def _request(self, name: str) -> Request | None:
        try:
            low = bytes.fromhex(name)
        except ValueError:
            return None
        if len(low) != 16:
            return None
        row = self._ledger.one(
            f"""SELECT {REQUEST} FROM request r JOIN batch_item bi ON bi.request = r.id
            WHERE r.key >= ? AND r.key < ? AND bi.batch = ?""", low, low + b"\xff" * 17, self.batch,
        )  # fmt: skip
        return Request(*row) if row else None

    def _known(self, request: Request) -> bytes | None:
        row = self._ledger.one("SELECT body FROM response WHERE request = ?", request.id)
        return row[0] if row else None

    def _stray(self, why: str, name: object, line: bytes) -> None:
        values = (self.batch, time.time(), why, str(name), line)
        # The same line again, from a second download, is not a second stray.
        same = "SELECT 1 FROM stray WHERE batch = ?1 AND why = ?3 AND line = ?5"
        self._pending.append((f"INSERT INTO stray SELECT ?1, ?2, ?3, ?4, ?5 WHERE NOT EXISTS ({same})", values))


def judged(data: dict[str, Any], chat: bool) -> Verdict:
    """Judge one line of an output or error file, in any of the shapes that are in use."""
    response, error = data.get("response"), data.get("error")
    if not isinstance(response, dict):
        code = str(error.get("code") or "no_response") if isinstance(error, dict) else "no_response"
        message = str(error.get("message") or "") if isinstance(error, dict) else str(error or "")
        return Verdict(Action.RETRY, code, message)
    status = response.get("status_code")
    request_id = response.get("request_id") or None
    if not isinstance(status, int) or status == 0:
        return Verdict(Action.RETRY, "no_status", "the line says neither what it is nor what went wrong", 0, request_id)
    said = verdict(status, {}, response.get("body"), chat)
    if said.action in (Action.STOP, Action.WAIT):  # it was said hours ago; the rest is planned again
        said = said._replace(action=Action.RETRY)
    return said._replace(request_id=request_id)
