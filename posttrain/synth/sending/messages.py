"""Anthropic's Messages interface: a chat in OpenAI's shape -> its request, its answer -> a chat completion; batches.

Sources: docs.anthropic.com, api/messages, api/creating-message-batches, api/errors.
"""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from posttrain.synth.errors import TaskStopped
from posttrain.synth.ledger.keys import Request
from posttrain.synth.ledger.replies import parsed
from posttrain.synth.sending.batch_api import BatchAPI, Missing, Remote

PATH = "/messages"
REASONS = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
    "refusal": "content_filter",
}  # fmt: skip
"""Why it ended, in OpenAI's words; any other reason stays as it is."""
CACHE = ("cache_creation_input_tokens", "cache_read_input_tokens")
ENDS = {"in_progress": "in_progress", "canceling": "cancelling", "ended": "completed"}
TRANSLATED = ("messages", "tools", "tool_choice", "stop", "max_completion_tokens")
SKEW = 120
"""Seconds that clocks may differ."""


def to_wire(body: dict[str, Any]) -> dict[str, Any]:
    """Return the request that a chat means: system turns at the top, tools and images in Anthropic's form."""
    messages: list[dict[str, Any]] = []
    system = []
    for message in body["messages"]:
        if message["role"] in ("system", "developer"):
            system += blocks(message.get("content"))
            continue
        role, content = turn(message)
        if messages and message["role"] == "tool" and messages[-1]["role"] == "user":
            messages[-1]["content"] += content  # all results of a turn are one message
        else:
            messages.append({"role": role, "content": content})
    made = {name: value for name, value in body.items() if name not in TRANSLATED}
    made["messages"] = messages
    if system:
        made["system"] = system
    made["max_tokens"] = body.get("max_completion_tokens") or body.get("max_tokens")
    if body.get("stop"):
        made["stop_sequences"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    if body.get("tools"):
        made["tools"] = [tool(given) for given in body["tools"]]
    if "tool_choice" in body:
        made["tool_choice"] = choice(body["tool_choice"])
    return made


def turn(message: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return (role, blocks) of a message."""
    content = [*(message.get("thinking_blocks") or []), *blocks(message.get("content"))]
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": content}
        return "user", [result]
    for call in message.get("tool_calls") or []:
        function = call["function"]
        given = function.get("arguments") or {}
        given = parsed(given.encode("utf-8", "surrogatepass")) if isinstance(given, str) else given
        content.append({"type": "tool_use", "id": call.get("id"), "name": function["name"], "input": given or {}})
    return message["role"], content


def blocks(content: Any) -> list[dict[str, Any]]:
    """Return content as blocks; an empty text is none, which Anthropic refuses."""
    if content is None or content == "":
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else [part(given) for given in content]


def part(given: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a message as a block: images by their data or their address."""
    if given.get("type") != "image_url":
        return given
    address = given["image_url"]["url"] if isinstance(given["image_url"], dict) else given["image_url"]
    if not address.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": address}}
    kind, _, data = address.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def tool(given: dict[str, Any]) -> dict[str, Any]:
    """Return a tool; one that is in Anthropic's form already stays."""
    function = given.get("function")
    if not isinstance(function, dict):
        return given
    made = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    return made | ({"description": function["description"]} if function.get("description") else {})


def choice(given: Any) -> dict[str, Any]:
    """Return which tool is to be called."""
    if isinstance(given, dict):
        return {"type": "tool", "name": given["function"]["name"]} if "function" in given else given
    return {"type": {"required": "any"}.get(given, given)}


def from_wire(reply: Any) -> Any:
    """Return an answer as a chat completion; anything else, such as an error, as it is."""
    if not isinstance(reply, dict) or reply.get("type") != "message" or not isinstance(reply.get("content"), list):
        return reply
    found = [block for block in reply["content"] if isinstance(block, dict)]
    text = "".join(str(b.get("text") or "") for b in found if b.get("type") == "text")
    thought = "".join(str(b.get("thinking") or "") for b in found if b.get("type") == "thinking")
    calls = [
        {"id": b.get("id"), "type": "function",
         "function": {"name": b.get("name"), "arguments": json.dumps(b.get("input") or {}, ensure_ascii=False)}}
        for b in found if b.get("type") == "tool_use"
    ]  # fmt: skip
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    message |= ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
    if calls and (signed := [b for b in found if b.get("type") in ("thinking", "redacted_thinking")]):
        message["thinking_blocks"] = signed  # a model that goes on after its calls wants to see what it thought
    used = _object(reply.get("usage"))
    counts = {name: _count(used.get(name)) for name in ("input_tokens", "output_tokens", *CACHE)}
    given = sum(counts[name] for name in ("input_tokens", *CACHE))
    reason = reply.get("stop_reason")
    return {
        "id": reply.get("id"), "object": "chat.completion", "model": reply.get("model"),
        "choices": [{"index": 0, "message": message, "finish_reason": REASONS.get(str(reason), reason)}],
        "usage": {
            "prompt_tokens": given, "completion_tokens": counts["output_tokens"],
            "prompt_tokens_details": {"cached_tokens": counts[CACHE[1]]},
        },
    }  # fmt: skip


class MessagesDialect:
    """One request at a time."""

    def request(self, request: Request, base: httpx.URL) -> tuple[str, httpx.URL, bytes]:
        """Return what to send."""
        body = to_wire(json.loads(request.body))
        return "POST", base.copy_with(path=base.path.rstrip("/") + PATH), json.dumps(body, ensure_ascii=False).encode()

    def follow(self, response: httpx.Response, base: httpx.URL) -> httpx.URL | None:
        """Return None: an answer is the answer."""
        return None

    def reply(self, response: httpx.Response) -> Any:
        """Return the body as a chat completion."""
        return from_wire(parsed(response.content))


class MessageBatches(BatchAPI):
    """Batches of Anthropic: made of requests and not of a file, and without a mark of ours.

    One whose reply was lost is known by when it was made and how many requests it holds.
    """

    def upload(self, path: Path) -> str:
        """Return what stands for the file, which stays here: its name, its lines, and when this was."""
        with open(path, "rb") as file:
            lines = sum(1 for _ in file)
        return f"{path.name}:{lines}:{time.time():.0f}"

    def uploaded(self, name: str, size: int) -> str | None:
        """Return None: there is nothing to look for."""
        return None

    def create(self, file_id: str, endpoint: str, nonce: str) -> Remote:
        """Make a batch; see `BatchAPI.create`."""
        path = self.folder / file_id.rpartition(":")[0].rpartition(":")[0]
        size = sum(map(len, _requests(path)))
        headers = {"content-type": "application/json", "content-length": str(size)}
        return self._made(self._remote, "messages/batches", content=_requests(path), headers=headers)

    def find(self, file_id: str, nonce: str) -> Remote | None:
        """Return the one batch that a lost call can have made.

        Raises:
            TaskStopped: there are several.
        """
        _, lines, since = file_id.rsplit(":", 2)
        found = []
        for entry in self._listed("messages/batches", {"limit": "100"}):
            made = _seconds(entry.get("created_at"))
            if made is not None and made < float(since) - SKEW:
                break  # the newest come first
            counts = entry.get("request_counts") or {}
            if sum(counts.values()) == int(lines) and not self.known(str(entry.get("id"))):
                found.append(self._remote(entry))
        if len(found) > 1:
            ids = ", ".join(batch.id for batch in found)
            raise TaskStopped(
                f"the reply to the call that makes a batch of {lines} requests was lost, and it can be any of {ids}: "
                "cancel those that are not yours at the provider, or wait until they are gone, and run again"
            )
        return found[0] if found else None

    def get(self, batch_id: str) -> Remote:
        """Return a batch; see `BatchAPI.get`."""
        return self._remote(self._json("GET", f"messages/batches/{batch_id}"))

    def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled."""
        response = self._call("POST", f"messages/batches/{batch_id}/cancel")
        if response.status_code >= 300 and response.status_code not in (400, 404, 409):
            self._checked(response, parsed(response.content))

    def lines(self, file_id: str) -> Iterator[bytes]:
        """Yield the results of a batch as lines of OpenAI's output files."""
        return map(output_line, self._content(f"messages/batches/{file_id}/results"))

    def _remote(self, data: Any) -> Remote:
        if not isinstance(data, dict) or not isinstance(data.get("id"), str) or "processing_status" not in data:
            raise Missing(f"not a batch: {json.dumps(data)[:200]}")
        counts = data.get("request_counts") or {}
        status = ENDS.get(str(data["processing_status"]), str(data["processing_status"]))
        if status == "completed" and data.get("cancel_initiated_at"):
            status = "cancelled"
        return Remote(
            id=data["id"], status=status, input_file_id=None,
            output_file_id=data["id"] if status in ("completed", "cancelled") else None, error_file_id=None,
            completed=int(counts.get("succeeded") or 0), failed=int(counts.get("errored") or 0), errors=[], nonce=None,
        )  # fmt: skip

    def _next_page(self, params: dict[str, str], last: str) -> dict[str, str]:
        return {**params, "after_id": last}


def _requests(path: Path) -> Iterator[bytes]:
    """Yield the body of the call that makes a batch of the lines of a file."""
    yield b'{"requests": ['
    with open(path, "rb") as file:
        for number, text in enumerate(file):
            line = json.loads(text)
            made = {"custom_id": line["custom_id"], "params": to_wire(line["body"])}
            yield (b", " if number else b"") + json.dumps(made, ensure_ascii=False).encode()
    yield b"]}"


def output_line(line: bytes) -> bytes:
    """Return a line of results as one of OpenAI's output file; what is not readable stays as it is."""
    data = parsed(line)
    result = data.get("result") if isinstance(data, dict) else None
    if not isinstance(result, dict):
        return line
    kind, response, error = result.get("type"), None, None
    if kind == "succeeded":
        response = {"status_code": 200, "request_id": None, "body": from_wire(result.get("message"))}
    elif kind == "errored":
        said = _object(result.get("error"))
        inner = _object(said.get("error")) or said
        status = 400 if inner.get("type") == "invalid_request_error" else 500
        response = {"status_code": status, "request_id": said.get("request_id"), "body": {"error": inner}}
    else:
        error = {"code": f"batch_{kind}", "message": f"the request has {kind} in its batch"}
    return json.dumps({"custom_id": data.get("custom_id"), "response": response, "error": error}).encode()


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**40 else 0


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _seconds(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
