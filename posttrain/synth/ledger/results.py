"""Rows of the ledger -> what users get: responses in the shape of a batch's output line, and rows to train on."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import DataError, SynthError
from posttrain.synth.ledger.keys import CHAT
from posttrain.synth.ledger.replies import HALF, HALF_SAID, choices, reasoning_of, text_of, whole, with_thoughts
from posttrain.synth.ledger.store import Ledger

log = logging.getLogger("posttrain.synth")
Reasoning = Literal["field", "think", "drop"]
Response = dict[str, Any]
"""`{"custom_id": "task_0", "response": {"status_code", "request_id", "body"} | None, "error": None | {...}}`"""


def responses(ledger: Ledger, task: int, name: str) -> Iterator[Response]:
    """Yield one response per request, in the order they were added; failures carry `error` and no `response`."""
    return (response for _, _, response in answers(ledger, task, name))


def answers(ledger: Ledger, task: int, name: str) -> Iterator[tuple[str, bytes, Response]]:
    """Yield (endpoint, body as it was sent, response) of each request, in the order they were added."""
    for row in ledger.results(task):
        pos, (reply, request_id, status, code, message, failed_id), waiting = row[0], row[5:11], row[14]
        made: Response = {"custom_id": f"{name}_{pos}", "response": None, "error": None}
        if reply is not None and (body := read(reply)) is None:
            made["error"] = {"code": HALF, "message": f"{HALF_SAID}; retry_failed=True asks again"}
        elif reply is not None:
            made["response"] = {"status_code": 200, "request_id": request_id, "body": body}
        elif waiting:
            made["error"] = {"code": "pending", "message": "in a batch that is not finished"}
        elif code is not None:
            made["error"] = {"code": code, "message": message, "status_code": status, "request_id": failed_id}
        else:
            made["error"] = {"code": "not_sent", "message": "was not sent yet: run the task"}
        yield row[1], row[3], made


def extracted(found: list[Response]) -> list[dict[str, Any]]:
    """Return `{"custom_id", "choices": [{"role", "content", ...}]}` of each response; none of a failed one."""
    made = []
    for response in found:
        body = (response["response"] or {}).get("body") or {}
        messages = [choice.get("message") or {} for choice in body.get("choices") or []]
        row: dict[str, Any] = {"custom_id": response["custom_id"], "choices": messages}
        made.append(row | ({"error": response["error"]} if response["error"] else {}))
    return made


def rows(ledger: Ledger, task: int, name: str, reasoning: Reasoning = "field") -> Iterator[dict[str, Any]]:
    """Yield conversations to train on: one per choice of each result, request and reply together.

    What was kept beside a request comes first. Requests without a result are left out (`posttrain synth errors` lists
    them), and choices with neither text nor a tool call, such as refusals, with a warning that counts them. What a
    model thought is `reasoning_content` of its message, which chat templates read ("field"), stands in `<think>` before
    the answer ("think"), or is left out ("drop").
    """
    empty = 0
    for pos, endpoint, model, body, extra, reply, *_ in ledger.results(task):
        if reply is None or (found := read(reply)) is None:
            continue
        if not endpoint.endswith(CHAT):
            raise SynthError(
                f"task {name!r} holds answers of {endpoint}, which are no conversations; use iter_responses"
            )
        asked = json.loads(body)
        kept = json.loads(extra) if extra else {}
        for index, choice in enumerate(found["choices"]):
            if not answers_something(choice.get("message") or {}):
                empty += 1
                continue
            yield {
                **kept,
                "messages": [*asked["messages"], _clean(choice.get("message") or {}, reasoning)],
                **({"tools": asked["tools"]} if asked.get("tools") else {}),
                "custom_id": f"{name}_{pos}", "choice": index, "model": model,
                "finish_reason": choice.get("finish_reason"),
            }  # fmt: skip
    if empty:
        log.warning("task %r: %d replies without text (refused, filtered or cut) are left out", name, empty)


def answers_something(message: dict[str, Any]) -> bool:
    """Whether a message holds text or a tool call."""
    return bool(text_of(message) or message.get("tool_calls"))


def read(reply: bytes) -> dict[str, Any] | None:
    """Return the body of a stored reply; None if it holds half a character: version 0.1 has kept such replies."""
    body: dict[str, Any] = json.loads(reply)
    found = choices(body, "message")
    return body if found is None or whole([choice["message"] for choice in found]) else None


def _clean(message: dict[str, Any], reasoning: Reasoning) -> dict[str, Any]:
    thought, text = reasoning_of(message) if reasoning != "drop" else None, text_of(message) or ""
    made = {"role": message.get("role") or "assistant"}
    made["content"] = with_thoughts(text, thought) if reasoning == "think" else text
    if thought and reasoning == "field":
        made["reasoning_content"] = thought
    return made | ({"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {})


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON. Half a character has no UTF-8; escaped, it is JSON all the same.

    Raises:
        DataError: it holds what JSON cannot.
    """
    try:
        text = json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        for name, value in row.items():
            if (kind := foreign(value)) is not None:
                raise DataError(
                    f"column {name!r} holds a {kind}, and rows are plain JSON data (text, numbers, true and false, "
                    "lists, objects): leave the column out, or make it text first"
                ) from None
        raise
    return (text if whole(text) else json.dumps(row)) + "\n"


def foreign(value: Any) -> str | None:
    """Return the type of what JSON cannot hold inside a value; None if there is nothing such."""
    if isinstance(value, dict):
        names = (type(name).__name__ for name in value if not isinstance(name, str | int | float | bool | None))
        return next(names, None) or next((kind for item in value.values() if (kind := foreign(item))), None)
    if isinstance(value, list | tuple):
        return next((kind for item in value if (kind := foreign(item))), None)
    return None if value is None or isinstance(value, str | int | float | bool) else type(value).__name__


def to_jsonl(made: Iterator[dict[str, Any]], path: Path) -> int:
    """Write rows as JSON lines, aside and then in place; return how many."""
    draft, count = path.with_name(path.name + ".part"), 0
    with lines_into(draft) as write:
        for row in made:
            write(row)
            count += 1
    with writing(path):
        draft.replace(path)
    return count


@contextmanager
def lines_into(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that writes a row as a line of JSON.

    Raises:
        SynthError: the disk is full, or the folder cannot be written.
        DataError: a row holds what JSON cannot.
    """
    with writing(path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def write(row: dict[str, Any]) -> None:
        text = line(row)
        with writing(path):
            file.write(text)

    try:
        yield write
    finally:
        with writing(path):
            file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and why.

    Raises:
        SynthError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise SynthError(
            f"{path} cannot be written: {why}. What was paid for is in the ledger: make room, and run the same again"
        ) from None


def to_parquet(made: Iterator[dict[str, Any]], path: Path) -> int:
    """Write rows as Parquet, in groups of 1000; return how many. Conversations, and whatever else is nested, are
    JSON text: their messages need not all have the same keys, and the trainers read it as it is.

    The rows go through a file of JSON lines first: what columns there are, and whether one of whole numbers holds
    fractions further down, is known after the last row only.

    Raises:
        SynthError: a column holds text and numbers, or numbers that no column of Parquet holds.
    """
    import pyarrow
    import pyarrow.parquet

    spool = path.with_name(path.name + ".rows")
    kinds: dict[str, set[str]] = {}

    def noted() -> Iterator[dict[str, Any]]:
        for row in made:
            for name, value in row.items():
                kinds.setdefault(name, set()).add(kind_of(value))
            yield row

    try:
        count = to_jsonl(noted(), spool)
        schema = pyarrow.schema([(name, column_type(name, found)) for name, found in kinds.items()] or [EMPTY])
        draft = path.with_name(path.name + ".part")
        with open(spool, encoding="utf-8") as lines, writing(path), pyarrow.parquet.ParquetWriter(draft, schema) as out:
            while group := [flat(json.loads(text)) for text in islice(lines, 1000)]:
                out.write_table(pyarrow.Table.from_pylist(group, schema=schema))
        draft.replace(path)
    except (pyarrow.ArrowException, UnicodeError, OverflowError) as error:
        raise SynthError(f"the rows do not fit one table ({error}); export them as .jsonl") from None
    finally:
        spool.unlink(missing_ok=True)
    return count


EMPTY = ("messages", "string")
"""The column of a table without rows."""


def kind_of(value: Any) -> str:
    """Return what a column must be able to hold for a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "a whole number beyond 64 bits"
    return "double" if isinstance(value, float) else "string"


def column_type(name: str, kinds: set[str]) -> str:
    """Return the type of a column that holds values of some kinds.

    Raises:
        SynthError: there is none that keeps them all as they are.

    >>> column_type("score", {"int64", "double", "null"}), column_type("note", {"null"})
    ('double', 'string')
    """
    found = kinds - {"null"}
    if found == {"int64", "double"}:
        return "double"
    if len(found) > 1 or (found and not found <= {"bool", "int64", "double", "string"}):
        raise SynthError(
            f"column {name!r} holds {' and '.join(sorted(found))}, which no column of Parquet keeps as they are; "
            "export as .jsonl"
        )
    return next(iter(found), "string")


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with what is nested as JSON text."""
    return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in row.items()}
