"""The end of a run that sends requests one by one: it wakes everybody who waits."""

import asyncio
import contextlib

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.session import Session
from posttrain.synth.sending.limits import Gate


class Ending:
    """Whether a run is over, since the user wants it or since something concerns the whole task."""

    def __init__(self, session: Session, gate: Gate) -> None:
        self._session, self._gate = session, gate
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self.why: TaskStopped | None = None
        session.on_stop.append(self._wake_from_anywhere)

    @property
    def has_come(self) -> bool:
        """Whether the run is over: nothing new is sent."""
        return self.why is not None or self._session.stopping.is_set()

    def bring(self, why: TaskStopped) -> None:
        """End the run for a reason; the first one counts."""
        self.why = self.why or why
        self._wake()

    def _wake_from_anywhere(self) -> None:
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken.set()
        self._gate.open_for_all()

    async def sleep(self, seconds: float) -> None:
        """Sleep, but not longer than the run."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)
