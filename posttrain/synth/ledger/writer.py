"""Replies that come in at the same time are committed together: they share one fsync."""

import asyncio
import threading

from posttrain.synth.ledger.database import Database, Statement

Waiting = list[tuple[list[Statement], "asyncio.Future[None]"]]


class Writer:
    """A thread that commits what has gathered while it was committing; for one event loop."""

    def __init__(self, ledger: Database) -> None:
        self._ledger, self._loop = ledger, asyncio.get_running_loop()
        self._waiting: Waiting = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    async def commit(self, statements: list[Statement]) -> None:
        """Return when statements that belong together are on the disk.

        Raises:
            SynthError: they cannot be written.
        """
        done = self._loop.create_future()
        with self._wake:
            self._waiting.append((statements, done))
            self._wake.notify()
        await done

    def close(self) -> None:
        """Commit what is left, and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closed:
                    self._wake.wait()
                taken, self._waiting = self._waiting, []
            if not taken:
                return
            error: Exception | None = None
            try:
                self._ledger.record(statement for statements, _ in taken for statement in statements)
            except Exception as found:  # whoever waits for these rows raises it
                error = found
            self._loop.call_soon_threadsafe(_tell, taken, error)


def _tell(taken: Waiting, error: Exception | None) -> None:
    for _, done in taken:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
