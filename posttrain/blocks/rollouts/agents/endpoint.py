"""A server on this machine that agents ask as they would ask OpenAI: chat completions, streamed or not.

Every rollout has an address of its own, so that what it asks can be told from what others ask.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, TypeAlias

CHATS, MODELS = "/v1/chat/completions", "/v1/models"
MODEL = "policy"
"""What the policy calls itself; requests may call it as they like."""
POLL = 0.05
"""Seconds between looks whether to stop listening."""
Ask: TypeAlias = Callable[[str, dict[str, Any]], dict[str, Any]]
"""A rollout's name and the body of its request -> the message of the policy, `finish_reason` and `usage`."""


class Refusal(Exception):
    """A request that is not answered, and why."""

    def __init__(self, message: str, code: str = "invalid_request", status: int = 400) -> None:
        super().__init__(message)
        self.code, self.status = code, status


class Endpoint:
    """Listens at a free port of this machine, which nobody outside can reach, while it is entered."""

    def __init__(self, ask: Ask) -> None:
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.ask = ask

    def __enter__(self) -> Self:
        work = partial(self.server.serve_forever, POLL)
        threading.Thread(target=work, name="posttrain-endpoint", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def address(self, name: str) -> str:
        """Return the base URL of a rollout."""
        return f"http://127.0.0.1:{self.server.server_port}/{name}/v1"


class Server(ThreadingHTTPServer):
    """A thread for each connection, since an answer comes when all that are asked are sampled together."""

    daemon_threads = True
    request_queue_size = 1024
    ask: Ask

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of agents that went away."""


class Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers in OpenAI's form."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""

    def do_GET(self) -> None:
        """List the model, as some clients ask before anything else."""
        _, _, path = self.path.lstrip("/").partition("/")
        if f"/{path}" == MODELS:
            self.send({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "posttrain"}]})
        else:
            self.refuse(Refusal(f"there is no {self.path} here", "not_found", 404))

    def do_POST(self) -> None:
        """Answer a request for a chat completion."""
        name, _, path = self.path.lstrip("/").partition("/")
        try:
            if f"/{path}" != CHATS:
                raise Refusal(f"the policy answers {CHATS}, and not /{path}", "not_found", 404)
            body = checked(self.body())
            answer = completion(self.server.ask(name, body))
        except Refusal as refusal:
            self.refuse(refusal)
        else:
            self.stream(answer, body) if body.get("stream") else self.send(answer)

    def body(self) -> Any:
        """Return what a request says.

        Raises:
            Refusal: it is no JSON.
        """
        length = self.headers.get("Content-Length")
        try:
            return json.loads(self.rfile.read(int(length)) if length else self.chunked())
        except ValueError:
            raise Refusal("the request is no JSON") from None

    def chunked(self) -> bytes:
        """Return a body that comes in pieces."""
        found = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def refuse(self, refusal: Refusal) -> None:
        """Say why there is no answer."""
        kind = "invalid_request_error"
        self.send({"error": {"message": str(refusal), "type": kind, "code": refusal.code}}, refusal.status)

    def send(self, answer: dict[str, Any], status: int = 200, kind: str = "application/json") -> None:
        """Write an answer."""
        self.write(json.dumps(answer).encode(), status, kind)

    def stream(self, answer: dict[str, Any], body: dict[str, Any]) -> None:
        """Write an answer as a stream of events, all at once: it is whole before it is sent."""
        events = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in chunks(answer, body))
        self.write(events + b"data: [DONE]\n\n", 200, "text/event-stream")

    def write(self, content: bytes, status: int, kind: str) -> None:
        """Write an answer of some kind; its reader may have gone."""
        self.close_connection = True
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")  # a kept connection would keep its thread
            self.end_headers()
            self.wfile.write(content)


IMPOSSIBLE = {
    "logit_bias": "it would change the distribution that is trained",
    "response_format": "it would change the distribution that is trained",
    "stop": "a reply ends where the policy ends it, or with a text of sampler.stop",
}
"""What a request may not ask, and why."""


def checked(body: Any) -> dict[str, Any]:
    """Return the body of a request.

    Raises:
        Refusal: it asks what the policy cannot do in training.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise Refusal("the request has no messages")
    for name, why in IMPOSSIBLE.items():
        if body.get(name) and body[name] != {"type": "text"}:
            raise Refusal(f"{name} cannot be used here: {why}")
    if body.get("n") not in (None, 1):
        raise Refusal("n cannot be used here: ask several times")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise Refusal("tool_choice can only be auto or none: the policy is not forced to say anything")
    return body


def completion(said: dict[str, Any]) -> dict[str, Any]:
    """Return what was said in the form of a chat completion."""
    message, reason = said["message"], said["finish_reason"]
    return {
        "id": said["id"], "object": "chat.completion", "created": int(time.time()), "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        "usage": said["usage"],
    }  # fmt: skip


def chunks(answer: dict[str, Any], body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream: the message, its end, and if wanted what was used."""
    (choice,) = answer["choices"]
    shared = {**answer, "object": "chat.completion.chunk"}
    del shared["usage"]
    delta = dict(choice["message"])
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    yield {**shared, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**shared, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**shared, "choices": [], "usage": answer["usage"]}
