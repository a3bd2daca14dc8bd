"""What every client of posttrain.synth can do: add requests to a task, plan it, run it, and read what came.

A client is a block: its fields say where requests go. Everything that changes is in the ledger of its `work_dir`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import attrs
from attrs.validators import ge, optional

from posttrain.errors import SynthError
from posttrain.registry import key
from posttrain.synth.clients.tasks import Tasks
from posttrain.synth.errors import IncompleteTask
from posttrain.synth.ledger import standing
from posttrain.synth.ledger.interrupt import interruptible
from posttrain.synth.ledger.keys import Scrubber, scrubbed
from posttrain.synth.ledger.live import shown, silent
from posttrain.synth.ledger.pricing import Budget, Plan, Price, estimated, within
from posttrain.synth.ledger.results import Response
from posttrain.synth.ledger.session import Progress, Session
from posttrain.synth.ledger.standing import Counts
from posttrain.synth.sending.batches.run import BatchRun, with_batches
from posttrain.synth.sending.batches.service import BatchService

OnError = Literal["raise", "return"]


@attrs.frozen(kw_only=True, slots=False)
class Synth(Tasks):
    """Base of all clients: `OpenAISynth`, `AzureOpenAISynth`, `VllmSynth`, `CortexSynth`."""

    prices: dict[str, Price] = attrs.field(factory=dict)
    """Model -> its price; without one, costs are unknown and `max_cost` cannot be held."""
    max_cost: float | None = key(None, check=optional(ge(0)))
    """Dollars that a task may cost in all; checked before anything is sent."""
    max_requests: int | None = key(None, check=optional(ge(0)))
    """Requests that one run may send, repeated attempts included."""

    # -- what a client of its own says ------------------------------------------------

    @property
    def batched(self) -> bool:
        """Whether requests go into batches, at the price of batches."""
        return False

    @property
    def local(self) -> bool:
        """Whether nothing is sent anywhere: then nothing is counted or paid."""
        return False

    def send(self, session: Session) -> None:
        """Send what a session has to send, and record what comes."""
        raise NotImplementedError

    def batch_service(self) -> BatchService:
        """Return where batches are made."""
        raise SynthError(
            f"{type(self).__name__} sends requests one by one here: there is nothing to save, upload or submit; call "
            "execute_batch_task"
        )

    # -- running ----------------------------------------------------------------------

    def plan(self, task_name: str) -> Plan:
        """Return what a run would send, and what that may cost."""
        task = self._task(task_name)
        counts, new = standing.counts(self.ledger, task), standing.to_send(self.ledger, task)
        under_way = estimated(self.prices, standing.in_batches(self.ledger, task), self.batched)
        unpriced = sorted({model for model, *_ in new if model not in self.prices})
        return Plan(
            total=counts.total, cached=counts.done, waiting=counts.waiting, failed=counts.permanent,
            new=sum(row[1] for row in new), input_tokens=sum(row[2] for row in new),
            output_tokens=sum(row[3] for row in new),
            cost=None if unpriced else estimated(self.prices, new, self.batched) / 1e6, spent=counts.cost,
            unpriced=unpriced, under_way=under_way / 1e6,
        )  # fmt: skip

    def _hold(self, task_name: str, max_cost: float | None, max_requests: int | None) -> None:
        """Refuse what would pass a bound, or whose cost nothing bounds."""
        plan = self.plan(task_name)
        unbounded = 0 if max_cost is None else standing.unbounded(self.ledger, self._task(task_name))
        within(attrs.evolve(plan, unbounded=unbounded), max_cost, max_requests)

    def run(
        self, task_name: str, *, max_cost: float | None = None, max_requests: int | None = None, wait: bool = True,
        retry_failed: bool = False, progress: Callable[[Progress], None] | None = None,
    ) -> Counts:  # fmt: skip
        """Send what has no result yet, and return how the task stands; results stay in the ledger.

        Args:
            task_name: whose requests.
            max_cost: dollars that the task may cost in all (the client's, unless given).
            max_requests: requests that this run may send (the client's, unless given).
            wait: stay until batches are finished. Otherwise submit them, take in those that are, and return.
            retry_failed: also send again what the server has refused for good.
            progress: called a few times a second; by default a terminal has a line that shows how it goes.

        Raises:
            TaskStopped: something concerns the whole task: a bound, a quota, a key, a server that stays away.
            KeyboardInterrupt: Ctrl-C; what was in flight has been waited for and is kept. A second one does not wait.
        """
        task = self._task(task_name)
        if retry_failed:
            self.ledger.forgive(task)
        max_cost = self.max_cost if max_cost is None else max_cost
        max_requests = self.max_requests if max_requests is None else max_requests
        self._hold(task_name, max_cost, max_requests)
        with shown(progress) as report, scrubbed(self.scrubber):
            session = self._session(task_name, max_cost, max_requests, report, wait)
            with interruptible(session):
                self.send(session)
        counts = self.status(task_name)
        if session.stopping.is_set():
            raise KeyboardInterrupt(
                f"{counts.done:,} of {counts.total:,} results are kept; run the same again to go on"
            )
        return counts

    def execute_batch_task(
        self, task_name: str, on_error: OnError = "raise", *, max_cost: float | None = None,
        max_requests: int | None = None, wait: bool = True, retry_failed: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Response]:  # fmt: skip
        """Run a task and return its responses: as many as were added, in their order, always. See `run`.

        Raises:
            IncompleteTask: some have no result, and `on_error` is "raise"; it carries all responses.
        """
        counts = self.run(
            task_name, max_cost=max_cost, max_requests=max_requests, wait=wait, retry_failed=retry_failed,
            progress=progress,
        )  # fmt: skip
        found = list(self.iter_responses(task_name))
        if on_error == "raise" and counts.failed:
            raise IncompleteTask(self.failures(task_name), found)
        return found

    def cancel(self, task_name: str) -> list[str]:
        """Cancel the batches of a task; their finished lines are charged, and taken in by the next run."""
        return list(self._step(task_name, BatchRun.cancel))

    @cached_property
    def scrubber(self) -> Scrubber:
        """What takes keys out of everything that is stored."""
        return Scrubber()

    def _session(
        self, name: str, max_cost: float | None, max_requests: int | None, report: Callable[[Progress], None],
        wait: bool,
    ) -> Session:  # fmt: skip
        task, counts = self._task(name), self.status(name)
        progress = Progress(total=counts.total, done=counts.done, first=counts.done, cost=counts.cost)
        budget = Budget(self.prices, self.batched, counts.cost or 0.0, max_cost, max_requests)
        budget.under_way(standing.in_batches(self.ledger, task))
        return Session(self.ledger, task, name, budget, self.scrubber, progress, report, wait)

    # -- the steps of a batch one by one ----------------------------------------------

    def save_batch_task(self, task_name: str) -> None:
        """Write the batch files of what has no result yet."""
        self._hold(task_name, self.max_cost, self.max_requests)
        self._step(task_name, lambda run: run.files.plan())

    def upload_batch_task(self, task_name: str) -> None:
        """Upload the files that were saved."""
        self._step(task_name, lambda run: run.starter.upload())

    def retrieve_uploaded_files(self, task_name: str) -> list[str]:
        """Return the ids of the files that were uploaded for open batches."""
        return list(self._step(task_name, lambda run: [b.file_id for b in run.batches.open() if b.file_id]))

    def submit_batch_task(self, task_name: str) -> None:
        """Make batches of the files that were uploaded."""
        self._step(task_name, lambda run: run.starter.submit())

    def retrieve_batch_task(self, task_name: str) -> list[dict[str, Any]]:
        """Ask how the batches stand; return `{"batch_id", "status", "lines", "state"}` of each open one."""

        def polled(run: BatchRun) -> list[dict[str, Any]]:
            run.collector.poll()
            return [
                {"batch_id": b.batch_id, "status": b.status, "lines": b.lines, "state": b.state}
                for b in run.batches.open()
            ]

        return list(self._step(task_name, polled))

    def download_batch_task(self, task_name: str) -> list[Response]:
        """Take in the files of batches that are over, and return all responses; the missing ones carry `error`."""
        self._step(task_name, lambda run: run.collector.ingest())
        return list(self.iter_responses(task_name))

    def _step(self, name: str, work: Callable[[BatchRun], Any]) -> Any:
        session = self._session(name, self.max_cost, self.max_requests, silent, True)
        with scrubbed(self.scrubber):
            return with_batches(self.batch_service(), session, work)
