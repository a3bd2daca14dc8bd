"""When the next request may be sent: one gate for all lanes of a run.

The number in flight doubles until the server first says that it is too much, then grows by one per window and
shrinks by a quarter per storm. A storm of 429s is one pause for everybody, not one per request.
"""

import asyncio
import random
from collections import deque

SHRINK = 0.75
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0


class Bucket:
    """So much per minute, a minute's worth at once at most."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute, self._level, self._time = per_minute, per_minute, now

    def delay(self, amount: float, now: float) -> float:
        """Return the seconds until so much may be taken; what is larger than a minute's worth waits for a full one."""
        self._level = min(self.per_minute, self._level + (now - self._time) * self.per_minute / 60)
        self._time = now
        return max(0.0, (min(amount, self.per_minute) - self._level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Take so much; the level may go below zero."""
        self._level -= amount


class Gate:
    """Lets lanes through, at most so many at once, so many per minute, and none during a pause."""

    def __init__(self, most: int, start: int, rpm: float | None, tpm: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self.most, self.allowed = most, float(min(most, start))
        self.in_flight = 0
        self.storms = 0
        self.storming_since: float | None = None
        """When the first 429 came since the last success."""
        self._steep = True
        self._paused_until = 0.0
        self._pause_began = 0.0
        self._closed = False
        self._row = 0
        """Storms without a success between them."""
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        now = self._loop.time()
        self._given = (rpm is not None, tpm is not None)
        self._requests = Bucket(rpm, now) if rpm else None
        self._tokens = Bucket(tpm, now) if tpm else None

    async def enter(self, tokens: int) -> float:
        """Wait until a request of so many tokens may be sent; return the time at which it is."""
        if self._closed:
            self.in_flight += 1
        elif self._waiting or self._delay(tokens) is not None:
            turn = self._loop.create_future()
            self._waiting.append((turn, tokens))
            self._wake()
            await turn
        else:
            self._count(tokens)
        return self._loop.time()

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens per minute are bounded."""
        return self._tokens is not None

    def give_back(self, tokens: int) -> None:
        """Return tokens that were reserved for a request and not used."""
        if self._tokens is not None:
            self._tokens.take(-tokens)

    def leave(self) -> None:
        """A request is back, whatever came of it."""
        self.in_flight -= 1
        self._wake()

    def succeeded(self) -> None:
        """Allow more after a success."""
        self.storming_since, self._row = None, 0
        if self.allowed < self.most:
            self.allowed = min(float(self.most), self.allowed + (1 if self._steep else 1 / self.allowed))

    def storm(self, sent: float, wait: float | None) -> None:
        """Pause everybody after a 429 for a request sent at a time; `wait` is what the server asked for."""
        now = self._loop.time()
        if self.storming_since is None:
            self.storming_since = now
        if sent >= self._pause_began:  # others sent before the pause began are the same storm
            self._pause_began, self._steep = now, False
            self.storms += 1
            self.allowed = max(1.0, self.allowed * SHRINK)
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**self._row) * random.uniform(0.5, 1)
            # What the server asks for is the least; one that keeps asking for nothing is not asked again at once.
            self.pause(wait if wait and self._row == 0 else max(backoff, wait or 0))
            self._row = min(self._row + 1, 10)
        elif wait is not None:
            self.pause(wait)

    def pause(self, seconds: float) -> None:
        """Let nobody through for so long."""
        self._paused_until = max(self._paused_until, self._loop.time() + seconds)

    def heard(self, rpm: float | None, tpm: float | None) -> None:
        """Keep to the limits that the server announced, unless the user gave some."""
        now = self._loop.time()
        if rpm and not self._given[0] and (self._requests is None or self._requests.per_minute != rpm):
            self._requests = Bucket(rpm, now)
        if tpm and not self._given[1] and (self._tokens is None or self._tokens.per_minute != tpm):
            self._tokens = Bucket(tpm, now)

    def open_for_all(self) -> None:
        """Let everybody through at once, now and later: they find that the run is over."""
        self._closed = True
        while self._waiting:
            turn, _ = self._waiting.popleft()
            self.in_flight += 1
            if not turn.done():
                turn.set_result(None)

    def _delay(self, tokens: int) -> float | None:
        """Return None if a request may go now, else the seconds until it may (infinity: when another is back)."""
        if self.in_flight >= int(self.allowed):
            return float("inf")
        now = self._loop.time()
        delay = self._paused_until - now
        if self._requests is not None:
            delay = max(delay, self._requests.delay(1, now))
        if self._tokens is not None:
            delay = max(delay, self._tokens.delay(tokens, now))
        return delay if delay > 0 else None

    def _count(self, tokens: int) -> None:
        self.in_flight += 1
        if self._requests is not None:
            self._requests.take(1)
        if self._tokens is not None:
            self._tokens.take(tokens)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            turn, tokens = self._waiting[0]
            delay = self._delay(tokens)
            if delay is not None:
                if delay != float("inf"):
                    self._timer = self._loop.call_later(delay, self._wake)
                return
            self._waiting.popleft()
            if turn.cancelled():
                continue
            self._count(tokens)
            turn.set_result(None)
