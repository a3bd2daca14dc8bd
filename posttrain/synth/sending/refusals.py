"""When a task is wrong as a whole, and not its rows: the same refusal, again and again, from all over it."""

from collections.abc import Callable

from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.replies import Verdict

SAME_FAILURES = 20
"""After so many refusals for the same reason in a row, requests from all over the task are tried. If they are refused
alike, it is not the rows that are wrong, and the task stops."""
PROBES = 3


class Refusals:
    """Those since the last result, and requests that are sent ahead of their turn to see whether others fare better."""

    def __init__(self, spread: Callable[[int], list[Request]]) -> None:
        self._spread = spread
        """Returns so many requests from all over the task."""
        self._found: list[tuple[str, int]] = []
        """(code, request) of each."""
        self._probing = 0
        """Refusals for the same reason that stop the task, once probes are out; 0: none are."""
        self.probes: list[Request] = []
        """To be sent next."""
        self.tried: set[int] = set()
        """Requests that were sent ahead of their turn."""

    def forget(self) -> None:
        """There is a result: it is not the task."""
        self._found.clear()
        self._probing = 0

    def all_alike(self, request: Request, said: Verdict) -> list[int]:
        """Count a refusal; return the requests that were refused alike if they are enough to stop the task."""
        self._found.append((said.code, request.id))
        same = [number for code, number in self._found if code == said.code]
        if len(same) < (self._probing or SAME_FAILURES):
            return []
        if not self._probing:
            self.probes = [each for each in self._spread(PROBES) if each.id not in same]
            self.tried |= {each.id for each in self.probes}
            self._probing = len(same) + len(self.probes)
            if self.probes:
                return []
        return same
