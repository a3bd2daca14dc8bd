"""What a client asks and what it was answered: requests go into the tasks of a ledger, and results are read from there.

Nothing is sent here; `client` does that.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from posttrain.errors import SynthError
from posttrain.registry import key
from posttrain.synth.clients.structured import How, as_asked
from posttrain.synth.ledger import results, standing
from posttrain.synth.ledger.keys import CHAT, canonical, content_hash, counted, estimates, in_order
from posttrain.synth.ledger.results import Reasoning, Response
from posttrain.synth.ledger.standing import Counts
from posttrain.synth.ledger.store import Ledger

if TYPE_CHECKING:
    from datasets import Dataset

FLUSH = 1000
"""So many requests are written to the ledger at once."""


@attrs.define
class Adding:
    """What this process has added to a task."""

    task: int
    count: int = 0
    rows: list[Any] = attrs.field(factory=list)
    """Not in the ledger yet."""


@attrs.frozen(kw_only=True, slots=False)
class Tasks:
    """The tasks of a work folder: what is added to them, and what came of it."""

    work_dir: Path = key(Path("runs/synth"), convert=Path)
    """Folder of the ledger. The same folder later means: go on, and pay for nothing twice."""
    weights: str | None = None
    """What tells the model that answers from others of its name, such as a revision or the step of a checkpoint: what
    one has answered is no answer of another. Needed where the weights behind a name change."""
    structured: Literal["json_schema", "tool", "prompt"] | None = None
    """How to ask for replies of a form: by `response_format`, by a tool that must be called, or in words. What the
    server can, unless given; say it for servers that speak OpenAI's protocol without `json_schema`."""

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

    def body(self, model: str | None, messages: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat request."""
        if not model:
            raise SynthError(f"{type(self).__name__} needs model=..., the name of what is to answer")
        messages, given = as_asked(messages, given, self.structured or self._forms)
        return {"model": model, "messages": messages, **given}

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
        extra = json.dumps(dict(keep), ensure_ascii=False).encode() if keep else None
        row = (content_hash(self._answers, endpoint, content), older, endpoint, model, content)
        adding.rows.append((*row, *estimates(body, len(content)), extra))
        adding.count += 1
        if len(adding.rows) >= FLUSH:
            self._flush(adding)
        return adding.count - 1

    def _flush(self, adding: Adding) -> None:
        rows, adding.rows = adding.rows, []
        self.ledger.add(adding.task, adding.count - len(rows), rows)

    def _task(self, name: str) -> int:
        """Return the number of a task, with all that was added to it in the ledger."""
        adding = self._adding.get(name)
        if adding is None:
            return self.ledger.find(name)
        if adding.rows:
            self._flush(adding)
            self.ledger.truncate(adding.task, adding.count)
        return adding.task

    @cached_property
    def _adding(self) -> dict[str, Adding]:
        return {}

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger, opened when it is first needed."""
        return Ledger.of(self.work_dir)

    # -- how it stands, and results ---------------------------------------------------

    def status(self, task_name: str) -> Counts:
        """Return how a task stands, by the ledger."""
        return standing.counts(self.ledger, self._task(task_name))

    def failures(self, task_name: str) -> str:
        """Return one paragraph about what has no result."""
        task = self._task(task_name)
        counts, errors = standing.counts(self.ledger, task), standing.errors(self.ledger, task)
        how = "run again to retry" if counts.permanent < counts.failed else "retry_failed=True sends them again"
        kinds = counted((code, number) for code, _, number, _ in errors)
        head = f"task {task_name!r}: {counts.failed:,} of {counts.total:,} requests have no result ({kinds}); {how}"
        return "\n".join([head, *(f"  {number:>7,} {code}: {message}" for code, message, number, _ in errors)])

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
