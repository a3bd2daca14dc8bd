"""Functions of this process as a client: what they are asked and answer is in the ledger, as with a server.

So a tool is called once for what it is asked, also when the run is stopped and goes on. A call that failed is an
answer, too.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import attrs

from posttrain.synth.clients.client import Synth
from posttrain.synth.ledger.session import Session, dumped

Call = Callable[[str, Any], tuple[str, bool]]
"""Takes (name, arguments); returns (what it says, whether it failed)."""


@attrs.frozen(kw_only=True, slots=False)
class Functions(Synth):
    """Answers calls of functions."""

    opened: Callable[[], AbstractContextManager[Call]]
    """Makes ready what answers, for the time of one run."""
    identity: str
    """What tells these functions from others: what one has answered is no answer of another."""
    concurrency: int = 8
    """Calls at the same time."""

    @property
    def local(self) -> bool:
        """Whether nothing is sent anywhere."""
        return True

    @property
    def namespace(self) -> str:
        """The functions."""
        return f"functions {self.identity}"

    def send(self, session: Session) -> None:
        """Answer what a session has to answer; what a chunk of calls brought is committed before the next one."""
        todo = session.todo()
        with self.opened() as call, ThreadPoolExecutor(self.concurrency) as pool:
            while not session.stopping.is_set() and (chunk := list(islice(todo, self.concurrency))):
                bodies = [json.loads(request.body) for request in chunk]
                said = pool.map(lambda body: call(body["model"], body["arguments"]), bodies)
                recorded = []
                for request, (text, failed) in zip(chunk, said, strict=True):
                    session.budget.reserve(request)
                    session.budget.release(request)
                    reply = {"content": text, "failed": failed}
                    recorded += session.result(request, reply, dumped(reply), None)
                session.ledger.record(recorded)
                session.report(session.progress)
