"""The servers of a run: which of them answers, and which is left alone for a while."""

import random

import httpx

from posttrain.synth.ledger.keys import Request
from posttrain.synth.sending.silence import Silence

OUTAGE = 3
"""So many requests that meet one of these in a row are an outage of the server; 500 and 504 can be about one row."""
OUTAGES = {502, 503, 529}
SHORTEST_EJECTION, LONGEST_EJECTION = 1.0, 30.0


class Endpoint:
    """One server, and whether it answers."""

    def __init__(self, url: str, patience: float) -> None:
        self.base = httpx.URL(url)
        self.silence = Silence(url, patience)
        self.in_flight = 0
        self.down_until = 0.0
        self._ejections = 0
        self.probing = False
        """A request is on its way to see whether it is back."""
        self._troubled: set[int] = set()
        """Requests that met an outage since the last answer."""

    def free(self, now: float) -> bool:
        """Whether a request may go there; after a pause one tries whether it is back, before all do."""
        return now >= self.down_until and not self.probing

    def begin(self) -> bool:
        """Count a request that is sent; true if it tries whether the server is back."""
        self.in_flight += 1
        self.probing = self.probing or bool(self._ejections)
        return bool(self._ejections)

    def end(self, probe: bool) -> None:
        """Count a request that has come back; `probe` is what `begin` has returned."""
        self.in_flight -= 1
        self.probing = self.probing and not probe

    def eject(self, now: float, why: str, wait: float = 0.0, others: bool = False) -> None:
        """Leave the server alone for a while, longer each time; lanes that find it down together count once."""
        self.silence.goes_on(why, others)
        if now >= self.down_until:
            backoff = min(LONGEST_EJECTION, SHORTEST_EJECTION * 2 ** min(self._ejections, 5))
            self.down_until = now + max(backoff, wait)
            self._ejections += 1

    def is_ill(self, request: Request) -> bool:
        """Whether it is the server that is ill and not one request: several have met the same since the last answer.
        Then it is to be left alone, and nothing counts against the requests."""
        self._troubled.add(request.id)
        return len(self._troubled) >= OUTAGE

    def answered(self, asked: float) -> None:
        """It is there: an answer has come to what was asked at that time."""
        self.silence.ends(asked)
        self._ejections, self.down_until = 0, 0.0
        self._troubled.clear()


class Endpoints:
    """All of them; they serve the same models."""

    def __init__(self, urls: list[str], patience: float) -> None:
        self.each = [Endpoint(url, patience) for url in urls]

    @property
    def secure(self) -> bool:
        """Whether one is spoken to over TLS."""
        return any(endpoint.base.scheme == "https" for endpoint in self.each)

    def best(self, now: float) -> Endpoint | None:
        """Return the one that answers and has the least to do; None if all are left alone."""
        found = min(self.each, key=lambda each: (not each.free(now), each.in_flight, random.random()))
        return found if found.free(now) else None

    def others_answer(self, endpoint: Endpoint) -> bool:
        """Whether another one than this is not known to give no answers."""
        return any(each.silence.since is None for each in self.each if each is not endpoint)

    def next_try(self, now: float) -> float:
        """Return the seconds until one of them may be tried again."""
        return min(each.down_until for each in self.each) - now
