"""What came of an attempt: recorded in the ledger, and whether the request, or the whole task, is at its end."""

import asyncio
from functools import partial

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.pricing import usage
from posttrain.synth.ledger.replies import CONFIGURED, TOO_LARGE_CODE, Action, Verdict
from posttrain.synth.ledger.session import Session, dumped
from posttrain.synth.ledger.writer import Writer
from posttrain.synth.sending.attempts import Sent
from posttrain.synth.sending.ending import Ending
from posttrain.synth.sending.limits import Gate
from posttrain.synth.sending.refusals import Refusals
from posttrain.synth.sending.service import Service


class Outcomes:
    """Judges and records what attempts brought."""

    def __init__(self, service: Service, session: Session, gate: Gate, ending: Ending) -> None:
        self.service, self.session, self.gate, self.ending = service, session, gate, ending
        self.writer = Writer(session.ledger)
        self.refusals = Refusals(partial(session.ledger.spread, session.task))
        self.successes = 0

    async def settled(self, request: Request, sent: Sent, sent_at: float, attempts: int) -> bool:
        """Record what came of an attempt; true if the request is at its end."""
        said, session = sent.said, self.session
        if said.action is Action.RESULT:
            await self._succeeded(request, sent)
            return True
        if said.action is Action.STOP:
            await self.writer.commit(session.attempt(request, said))
            self.ending.bring(TaskStopped(session.stop_message(said)))
            return True
        if said.wait is not None and said.wait > self.service.patience:
            self._stop(said, f"it asks to wait {said.wait:,.0f} s; patience is {self.service.patience:g} s")
            await self.writer.commit(session.attempt(request, said))
            return True
        if said.action is Action.WAIT:
            self._storm(said, sent_at)
            return False
        if said.action is Action.RETRY and said.status is not None and said.status < 300:
            session.budget.charged(request)
        if said.action is Action.PAUSE or (said.action is Action.RETRY and attempts < self.service.attempts):
            session.progress.retries += 1
            await self.writer.commit(session.attempt(request, said))
            return False
        await self._given_up(request, said)
        return True

    async def _succeeded(self, request: Request, sent: Sent) -> None:
        self.successes += 1
        self.refusals.forget()
        self.gate.succeeded()
        if self.gate.counts_tokens and any(used := usage(sent.reply)):
            self._settle(request, used)
        content = sent.content or dumped(sent.reply)
        await self.writer.commit(self.session.result(request, sent.reply, content, sent.said.request_id))

    async def _given_up(self, request: Request, said: Verdict) -> None:
        permanent = False
        if said.action is Action.REFUSED:
            self._settle(request, (0, 0, 0))
            # What was told to wait again and again is sent again by the next run, and says nothing about the task.
            permanent = said.status != 429 or said.code == TOO_LARGE_CODE
        if permanent and self.ending.why is None:
            await self._count_refusal(request, said)
        permanent = permanent and self.ending.why is None
        await self.writer.commit(self.session.failure(request, said, permanent))

    def _settle(self, request: Request, used: tuple[int, int, int]) -> None:
        """Give back the tokens per minute that a request has reserved and not used, by what its reply says it used."""
        self.gate.give_back(request.tokens + request.reserve - used[0] - used[1])

    def _storm(self, said: Verdict, sent_at: float) -> None:
        self.gate.storm(sent_at, said.wait)
        self.session.progress.storms = self.gate.storms
        since = self.gate.storming_since
        if since is not None and asyncio.get_running_loop().time() - since > self.service.patience:
            self._stop(said, f"nothing else for {self.service.patience:g} s")

    async def _count_refusal(self, request: Request, said: Verdict) -> None:
        """Stop a task of which everything is refused for one reason. What is as a rule about the key or the model is
        sent again by the next run; anything else counts against its row, so that rows at the head block no run."""
        same = self.refusals.all_alike(request, said)
        if not same:
            return
        pardoned = said.status in CONFIGURED
        again = "the next run sends them again" if pardoned else "retry_failed=True sends them again"
        self._stop(said, f"{len(same)} requests in a row, from all over the task, were refused like this; {again}")
        if pardoned:
            pardon = "UPDATE failure SET permanent = 0 WHERE request = ?"
            await self.writer.commit([(pardon, (number,)) for number in same])

    def _stop(self, said: Verdict, more: str) -> None:
        """End the run for what was said, with our remark behind it."""
        self.ending.bring(TaskStopped(self.session.stop_message(said._replace(message=f"{said.message} ({more})"))))
