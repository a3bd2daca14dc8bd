"""A server that gives no answers: said once, tried again for as long as patience lasts, then the end of the run."""

import logging
import time
from datetime import datetime, timedelta

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.session import Session

log = logging.getLogger("posttrain.synth")


class NoServer(TaskStopped):
    """No server has given an answer for longer than patience lasts."""


class Silence:
    """How long one server has given no answers."""

    def __init__(self, url: str, patience: float) -> None:
        self.url, self.patience = url.rstrip("/"), patience
        self.reached = False
        """Whether it has answered in this run."""
        self.since: float | None = None
        """When the first answer failed to come; None while there are answers."""
        self.why = ""

    def goes_on(self, why: str, others: bool = False) -> None:
        """Take note that no answer came, and of the reason; the first time, say so.

        Args:
            why: in words, without secrets.
            others: whether there are servers that answer.
        """
        self.why = why
        if self.since is not None:
            return
        self.since = time.monotonic()
        until = datetime.now() + timedelta(seconds=self.patience)
        then = f"it is tried until {until:%H:%M:%S} (patience: {self.patience:g} s)"
        log.warning("%s; %s", self, "the other servers go on" if others else then)

    def ends(self, asked: float) -> None:
        """An answer has come to what was asked at a time of `time.monotonic()`. One to what had been asked before the
        silence began says nothing about now."""
        self.reached = True
        if self.since is not None and asked >= self.since:
            log.warning("%s answers again", self.url)
            self.since = None

    @property
    def left(self) -> float:
        """Seconds of patience that are left."""
        return self.patience if self.since is None else max(0.0, self.since + self.patience - time.monotonic())

    def __str__(self) -> str:
        ago = timedelta(seconds=0.0 if self.since is None else time.monotonic() - self.since)
        return f"no answers from {self.url} since {datetime.now() - ago:%Y-%m-%d %H:%M:%S} ({self.why})"


def no_server(silent: list[Silence], session: Session) -> NoServer:
    """Return what ends a run."""
    progress, ledger = session.progress, session.ledger
    return NoServer(
        f"task {session.name!r} stopped: no_server: {'; '.join(map(str, silent))}; patience is "
        f"{silent[0].patience:g} s. {progress.done:,} of {progress.total:,} results are kept in {ledger.path}; when a "
        "server is back, run the same again: it goes on from there"
    )
