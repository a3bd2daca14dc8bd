"""Rows of the ledger -> what users get: responses in the shape of a batch's output line, and rows to train on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import SynthError
from posttrain.synth.ledger.keys import CHAT
from posttrain.synth.ledger.replies import HALF, HALF_SAID, choices, whole
from posttrain.synth.ledger.store import Ledger

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


def rows(ledger: Ledger, task: int, name: str) -> Iterator[dict[str, Any]]:
    """Yield conversations to train on: one per choice of each result, request and reply together. What was kept
    beside a request comes first; requests without a result are left out (`posttrain synth errors` lists them)."""
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
            yield {
                **kept,
                "messages": [*asked["messages"], _clean(choice.get("message") or {})],
                **({"tools": asked["tools"]} if asked.get("tools") else {}),
                "custom_id": f"{name}_{pos}", "choice": index, "model": model,
                "finish_reason": choice.get("finish_reason"),
            }  # fmt: skip


def read(reply: bytes) -> dict[str, Any] | None:
    """Return the body of a stored reply; None if it holds half a character: version 0.1 has kept such replies."""
    body: dict[str, Any] = json.loads(reply)
    found = choices(body, "message")
    return body if found is None or whole([choice["message"] for choice in found]) else None


def _clean(message: dict[str, Any]) -> dict[str, Any]:
    made = {"role": message.get("role") or "assistant", "content": message.get("content") or ""}
    return made | ({"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {})


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON. Half a character has no UTF-8; escaped, it is JSON all the same."""
    text = json.dumps(row, ensure_ascii=False)
    return (text if whole(text) else json.dumps(row)) + "\n"


def to_jsonl(made: Iterator[dict[str, Any]], path: Path) -> int:
    """Write rows as JSON lines, aside and then in place; return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, count = path.with_name(path.name + ".part"), 0
    with open(draft, "w", encoding="utf-8") as file:
        for row in made:
            file.write(line(row))
            count += 1
    draft.replace(path)
    return count


def to_parquet(made: Iterator[dict[str, Any]], path: Path) -> int:
    """Write rows as Parquet, in groups of 1000; return how many. Conversations, and whatever else is nested, are
    JSON text: their messages need not all have the same keys, and the trainers read it as it is."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    draft, count = path.with_name(path.name + ".part"), 0
    writer: Any = None
    try:
        for group in _groups(made, 1000):
            flat = [
                {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in r.items()}
                for r in group
            ]
            schema = writer.schema if writer else None
            table = pyarrow.Table.from_pylist(flat, schema=schema)
            writer = writer or pyarrow.parquet.ParquetWriter(draft, table.schema)
            writer.write_table(table)
            count += len(group)
        if writer is None:
            writer = pyarrow.parquet.ParquetWriter(draft, pyarrow.schema([("messages", pyarrow.string())]))
    except pyarrow.ArrowException as error:
        raise SynthError(f"the rows do not fit one table ({error}); export them as .jsonl") from None
    finally:
        if writer is not None:
            writer.close()
    draft.replace(path)
    return count


def _groups(made: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in made:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
