"""What every client of posttrain.synth can do: add requests to a task, plan it, run it, and read what came.

A client is a block: its fields say where requests go. Everything that changes is in the ledger of its `work_dir`.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs.validators import ge, optional

from posttrain.errors import SynthError
from posttrain.registry import key
from posttrain.synth.clients.structured import How, as_asked
from posttrain.synth.errors import IncompleteTask
from posttrain.synth.ledger import results
from posttrain.synth.ledger.keys import CHAT, Scrubber, canonical, content_hash, counted, estimates, in_order, scrubbed
from posttrain.synth.ledger.live import shown, silent
from posttrain.synth.ledger.pricing import Budget, Plan, Price, within
from posttrain.synth.ledger.results import Reasoning, Response
from posttrain.synth.ledger.session import Progress, Session
from posttrain.synth.ledger.store import Counts, Ledger, extra_of
from posttrain.synth.sending.batch import BatchRun, with_batches
from posttrain.synth.sending.batch_api import BatchService

if TYPE_CHECKING:
    from datasets import Dataset

FLUSH = 1000
OnError = Literal["raise", "return"]


@attrs.define
class Adding:
    """What this process has added to a task."""

    task: int
    count: int = 0
    rows: list[Any] = attrs.field(factory=list)
    """Not in the ledger yet."""


@attrs.frozen(kw_only=True, slots=False)
class Synth:
    """Base of all clients: `OpenAISynth`, `AzureOpenAISynth`, `VllmSynth`, `CortexSynth`."""

    work_dir: Path = key(Path("runs/synth"), convert=Path)
    """Folder of the ledger. The same folder later means: go on, and pay for nothing twice."""
    prices: dict[str, Price] = attrs.field(factory=dict)
    """Model -> its price; without one, costs are unknown and `max_cost` cannot be held."""
    weights: str | None = None
    """What tells the model that answers from others of its name, such as a revision or the step of a checkpoint: what
    one has answered is no answer of another. Needed where the weights behind a name change."""
    structured: Literal["json_schema", "tool", "prompt"] | None = None
    """How to ask for replies of a form: by `response_format`, by a tool that must be called, or in words. What the
    server can, unless given; say it for servers that speak OpenAI's protocol without `json_schema`."""
    max_cost: float | None = key(None, check=optional(ge(0)))
    """Dollars that a task may cost in all; checked before anything is sent."""
    max_requests: int | None = key(None, check=optional(ge(0)))
    """Requests that one run may send, repeated attempts included."""

    # -- what a client of its own says ------------------------------------------------

    @property
    def namespace(self) -> str:
        """Whose model names are meant; requests of different namespaces are never the same."""
        raise NotImplementedError

    @cached_property
    def _answers(self) -> str:
        """What answers: the namespace, and the weights where they were named."""
        return f"{self.namespace} weights={self.weights}" if self.weights else self.namespace

    @property
    def _forms(self) -> How:
        """How its server is asked for a form, unless the user says how."""
        return "json_schema"

    @property
    def _only_chats(self) -> bool:
        """Whether it speaks an interface of its own, of which this library knows the chats."""
        return False

    @property
    def batched(self) -> bool:
        """Whether requests go into batches, at the price of batches."""
        return False

    @property
    def local(self) -> bool:
        """Whether nothing is sent anywhere: then nothing is counted or paid."""
        return False

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat request."""
        if not model:
            raise SynthError(f"{type(self).__name__} needs model=..., the name of what is to answer")
        messages, given = as_asked(messages, given, self.structured or self._forms)
        return {"model": model, "messages": messages, **given}

    def send(self, session: Session) -> None:
        """Send what a session has to send, and record what comes."""
        raise NotImplementedError

    def batch_service(self) -> BatchService:
        """Return where batches are made."""
        raise SynthError(
            f"{type(self).__name__} sends requests one by one here: there is nothing to save, upload or submit; call "
            "execute_batch_task"
        )

    # -- adding -----------------------------------------------------------------------

    def begin_batch_task(self, task_name: str) -> None:
        """Begin a task again: what is added from here on replaces what this process had added. Results stay."""
        self._adding.pop(task_name, None)

    def add_chat_to_batch_task(
        self, task_name: str, messages: list[dict[str, Any]], model: str | None = None,
        keep: Mapping[str, Any] | None = None, **body: Any,
    ) -> int:  # fmt: skip
        """Add a chat to a task and return its position, counted from 0.

        Args:
            task_name: made when it is first used. What a process adds replaces what an earlier one had added.
            messages: in OpenAI's format.
            model: which one is to answer.
            keep: columns to find beside the result in `to_dataset` and `to_parquet`.
            **body: everything else of the request, as the provider documents it: `temperature`, `max_tokens`, ...
        """
        return self.add_request_to_batch_task(task_name, CHAT, self.body(model, messages, body), keep)

    def add_request_to_batch_task(
        self, task_name: str, endpoint: str, body: dict[str, Any], keep: Mapping[str, Any] | None = None
    ) -> int:
        """Add a request to any endpoint, such as `/embeddings`, or `/classify` of a reward model.

        Raises:
            SynthError: the client knows no such endpoint.
        """
        if self._only_chats and endpoint != CHAT:
            raise SynthError(
                f"{type(self).__name__} answers chats only, not {endpoint}: give the step a `client` of its own"
            )
        content, given = canonical(in_order(body)), canonical(body)
        adding = self._adding.get(task_name)
        if adding is None:
            adding = self._adding[task_name] = Adding(self.ledger.task(task_name))
        model = str(body.get("model") or "")
        older = content_hash(self._answers, endpoint, given) if given != content else None
        row = (content_hash(self._answers, endpoint, content), older, endpoint, model, content)
        adding.rows.append((*row, *estimates(body, len(content)), extra_of(dict(keep) if keep else None)))
        adding.count += 1
        if len(adding.rows) >= FLUSH:
            self._flush(adding)
        return adding.count - 1

    # -- running ----------------------------------------------------------------------

    def plan(self, task_name: str) -> Plan:
        """Return what a run would send, and what that may cost."""
        task = self._task(task_name)
        counts, new = self.ledger.counts(task), self.ledger.new(task)
        unpriced = sorted({model for model, *_ in new if model not in self.prices})
        micros = sum(
            self.prices[model].micros(given, made, batch=self.batched)
            for model, _, given, made in new if model in self.prices
        )  # fmt: skip
        return Plan(
            total=counts.total, cached=counts.done, waiting=counts.waiting, failed=counts.permanent,
            new=sum(row[1] for row in new), input_tokens=sum(row[2] for row in new),
            output_tokens=sum(row[3] for row in new), cost=None if unpriced else micros / 1e6, spent=counts.cost,
            unpriced=unpriced, under_way=self._under_way(task),
        )  # fmt: skip

    def _hold(self, task_name: str, max_cost: float | None, max_requests: int | None) -> None:
        """Refuse what would pass a bound, or whose cost nothing bounds."""
        plan = self.plan(task_name)
        unbounded = 0 if max_cost is None else self.ledger.unbounded(self._task(task_name))
        within(attrs.evolve(plan, unbounded=unbounded), max_cost, max_requests)

    def _under_way(self, task: int) -> float:
        budget = Budget(self.prices, self.batched, 0.0, None, None)
        budget.under_way(self.ledger.waiting(task))
        return budget.reserved / 1e6

    def status(self, task_name: str) -> Counts:
        """Return how a task stands, by the ledger."""
        return self.ledger.counts(self._task(task_name))

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
            session = self._session(task, task_name, max_cost, max_requests, report, wait)
            with _interruptible(session):
                self.send(session)
        if session.stopping.is_set():
            counts = self.ledger.counts(task)
            raise KeyboardInterrupt(
                f"{counts.done:,} of {counts.total:,} results are kept; run the same again to go on"
            )
        return self.ledger.counts(task)

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

    def failures(self, task_name: str) -> str:
        """Return one paragraph about what has no result."""
        task = self._task(task_name)
        counts, errors = self.ledger.counts(task), self.ledger.errors(task)
        lines = [f"  {number:>7,} {code}: {message}" for code, message, number, _ in errors]
        how = "run again to retry" if counts.permanent < counts.failed else "retry_failed=True sends them again"
        kinds = counted((code, number) for code, _, number, _ in errors)
        return "\n".join(
            [
                f"task {task_name!r}: {counts.failed:,} of {counts.total:,} requests have no result ({kinds}); {how}",
                *lines,
            ]
        )

    def cancel(self, task_name: str) -> list[str]:
        """Cancel the batches of a task; their finished lines are charged, and taken in by the next run."""
        return list(self._step(task_name, BatchRun.cancel))

    # -- the steps of a batch one by one ----------------------------------------------

    def save_batch_task(self, task_name: str) -> None:
        """Write the batch files of what has no result yet."""
        self._hold(task_name, self.max_cost, self.max_requests)
        self._step(task_name, BatchRun.plan)

    def upload_batch_task(self, task_name: str) -> None:
        """Upload the files that were saved."""
        self._step(task_name, BatchRun.upload)

    def retrieve_uploaded_files(self, task_name: str) -> list[str]:
        """Return the ids of the files that were uploaded for open batches."""
        return list(self._step(task_name, lambda run: [b.file_id for b in run.open() if b.file_id]))

    def submit_batch_task(self, task_name: str) -> None:
        """Make batches of the files that were uploaded."""
        self._step(task_name, BatchRun.submit)

    def retrieve_batch_task(self, task_name: str) -> list[dict[str, Any]]:
        """Ask how the batches stand; return `{"batch_id", "status", "lines", "state"}` of each open one."""

        def polled(run: BatchRun) -> list[dict[str, Any]]:
            run.poll()
            return [
                {"batch_id": b.batch_id, "status": b.status, "lines": b.lines, "state": b.state} for b in run.open()
            ]

        return list(self._step(task_name, polled))

    def download_batch_task(self, task_name: str) -> list[Response]:
        """Take in the files of batches that are over, and return all responses; the missing ones carry `error`."""
        self._step(task_name, BatchRun.ingest)
        return list(self.iter_responses(task_name))

    # -- results ----------------------------------------------------------------------

    def iter_responses(self, task_name: str) -> Iterator[Response]:
        """Yield the responses one by one, in order; memory does not grow with the task."""
        return results.responses(self.ledger, self._task(task_name), task_name)

    def extract_messages_from_responses(self, responses: list[Response]) -> list[dict[str, Any]]:
        """Return the messages of the replies: `[{"custom_id", "choices": [{"role", "content"}]}]`."""
        return results.extracted(responses)

    def iter_rows(self, task_name: str, reasoning: Reasoning = "field") -> Iterator[dict[str, Any]]:
        """Yield conversations to train on, one per choice of each result.

        Args:
            task_name: whose results.
            reasoning: what a model thought is `reasoning_content` of its message, as chat templates read it ("field"),
                stands in `<think>` before the answer ("think"), or is left out ("drop").
        """
        return results.rows(self.ledger, self._task(task_name), task_name, reasoning)

    def to_jsonl(self, task_name: str, path: str | Path, reasoning: Reasoning = "field") -> int:
        """Write conversations to train on as JSON lines; return how many. See `iter_rows`."""
        return results.to_jsonl(self.iter_rows(task_name, reasoning), Path(path))

    def to_parquet(self, task_name: str, path: str | Path, reasoning: Reasoning = "field") -> int:
        """Write conversations to train on as Parquet; return how many. See `iter_rows`."""
        return results.to_parquet(self.iter_rows(task_name, reasoning), Path(path))

    def to_dataset(self, task_name: str, reasoning: Reasoning = "field") -> "Dataset":
        """Return conversations to train on as a `datasets.Dataset`. See `iter_rows`."""
        import pyarrow.parquet
        from datasets import Dataset

        path = self.ledger.folder / f"{task_name}.export.parquet"
        self.to_parquet(task_name, path, reasoning)
        try:
            return Dataset(pyarrow.parquet.read_table(path))
        finally:
            path.unlink()

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: another process opens the ledger, and looks keys up, by itself."""
        return {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # -- helpers ----------------------------------------------------------------------

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger, opened when it is first needed."""
        return Ledger.of(self.work_dir)

    @cached_property
    def scrubber(self) -> Scrubber:
        """What takes keys out of everything that is stored."""
        return Scrubber()

    @cached_property
    def _adding(self) -> dict[str, Adding]:
        return {}

    def _flush(self, adding: Adding) -> None:
        rows, adding.rows = adding.rows, []
        self.ledger.add(adding.task, adding.count - len(rows), rows)

    def _task(self, name: str) -> int:
        adding = self._adding.get(name)
        if adding is None:
            return self.ledger.find(name)
        if adding.rows:
            self._flush(adding)
            self.ledger.truncate(adding.task, adding.count)
        return adding.task

    def _session(
        self, task: int, name: str, max_cost: float | None, max_requests: int | None,
        report: Callable[[Progress], None], wait: bool,
    ) -> Session:  # fmt: skip
        counts = self.ledger.counts(task)
        progress = Progress(total=counts.total, done=counts.done, first=counts.done, cost=counts.cost)
        budget = Budget(self.prices, self.batched, counts.cost or 0.0, max_cost, max_requests)
        budget.under_way(self.ledger.waiting(task))
        return Session(self.ledger, task, name, budget, self.scrubber, progress, report, wait)

    def _step(self, name: str, work: Callable[[BatchRun], Any]) -> Any:
        session = self._session(self._task(name), name, self.max_cost, self.max_requests, silent, True)
        with scrubbed(self.scrubber):
            return with_batches(self.batch_service(), session, work)


@contextlib.contextmanager
def _interruptible(session: Session) -> Iterator[None]:
    """Let the first Ctrl-C end the run in order; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if session.stopping.is_set():
            raise KeyboardInterrupt("interrupted twice")
        session.stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
