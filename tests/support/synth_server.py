"""A server that speaks Files + Batches + chat over real sockets, counts what is paid, and misbehaves on request.

State lives in memory of the test process; clients that are killed run in processes of their own.
"""

import contextlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

Fault = Callable[["Handler"], bool]
"""Does something to an answer; true if it has answered."""


def chat(body: dict[str, Any]) -> dict[str, Any]:
    text = body["messages"][-1]["content"]
    choices = [
        {"index": i, "message": {"role": "assistant", "content": f"re: {text}"}, "finish_reason": "stop"}
        for i in range(body.get("n", 1))
    ]
    return {"id": "c", "choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}


class Server:
    """`paid` counts by the text of the last message; `faults` are taken one per call to a path, in order."""

    def __init__(self) -> None:
        self.paid: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.headers_seen: list[dict[str, str]] = []
        self.bodies: list[Any] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]] = lambda body: (200, chat(body))
        self.finish: Callable[[Server, dict[str, Any], list[dict[str, Any]]], None] = complete
        self.lock = threading.RLock()
        self.most_in_flight = self.in_flight = 0
        self.delay = 0.0
        self.connections: set[socket.socket] = set()
        self.dead = False
        self.listen(0)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def listen(self, port: int) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("H", (Handler,), {"server_": self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def die(self) -> None:
        """Be gone as a process that was killed: nobody listens, and all connections are cut."""
        self.close()  # first: whoever finds it gone may start it again at once
        with self.lock:  # an answer that was begun is sent
            self.dead = True
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def back(self) -> None:
        """Be there again, at the same address and with what it knew."""
        self.listen(self.http.server_address[1])
        self.dead = False

    @property
    def paid_lines(self) -> int:
        return sum(self.paid.values())

    def store(self, content: bytes, name: str = "out.jsonl") -> str:
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = {
            "id": file_id,
            "object": "file",
            "filename": name,
            "bytes": len(content),
            "status": "processed",
        }
        self.contents[file_id] = content
        return file_id


def output_line(line: dict[str, Any], status: int = 200, body: Any = None) -> dict[str, Any]:
    body = chat(line["body"]) if body is None else body
    return {
        "id": "b",
        "custom_id": line["custom_id"],
        "response": {"status_code": status, "request_id": "r", "body": body},
        "error": None,
    }


def written(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def complete(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Finish a batch as OpenAI does: everything in one file, in another order."""
    pay(server, lines)
    batch.update(
        status="completed",
        output_file_id=server.store(written([output_line(x) for x in reversed(lines)])),
        error_file_id="",
    )


def pay(server: Server, lines: list[dict[str, Any]]) -> None:
    server.paid.update(line["body"]["messages"][-1]["content"] for line in lines)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: without this, an answer takes 40 ms
    server_: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle(self) -> None:
        self.server_.connections.add(self.connection)
        try:
            super().handle()
        except (ConnectionError, OSError, ValueError):  # the client was killed, or a fault closed the connection
            self.close_connection = True
        finally:
            self.server_.connections.discard(self.connection)

    def do_GET(self) -> None:
        self.route("GET")

    def do_POST(self) -> None:
        self.route("POST")

    def route(self, method: str) -> None:
        server = self.server_
        self.content = self.rfile.read(int(self.headers.get("content-length") or 0))
        parsed = urlparse(self.path)
        self.query = {k: v[0] for k, v in parse_qs(parsed.query).items()}
        path = re.sub(r"^/(v1|openai/v1|openai)(?=/)", "", parsed.path)
        key = f"{method} {re.sub(r'(file|batch)-[0-9]+', 'ID', path)}"
        with server.lock:
            server.calls[key] += 1
            server.headers_seen.append(dict(self.headers))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.faults[key].pop(0) if server.faults.get(key) else None
        try:
            if server.delay:
                time.sleep(server.delay)
            if fault is not None and fault(self):
                return
            self.answer(key, path)
        finally:
            with server.lock:
                server.in_flight -= 1

    def answer(self, key: str, path: str) -> None:
        server = self.server_
        identity = re.search(r"(?:file|batch)-[0-9]+", path)
        name = identity[0] if identity else ""
        with server.lock:
            if server.dead:
                raise ConnectionAbortedError
            if key == "POST /files":
                self.json(server.files[self.saved()])
            elif key == "GET /files":
                self.json({"object": "list", "data": list(server.files.values())[::-1], "has_more": False})
            elif key == "GET /files/ID/content":
                self.send(200, server.contents[name]) if name in server.contents else self.json({"error": {}}, 404)
            elif key == "POST /batches":
                self.json(self.created())
            elif key == "GET /batches":
                self.listing()
            elif key == "GET /batches/ID":
                self.polled(name)
            elif key == "POST /batches/ID/cancel":
                server.batches[name]["status"] = "cancelling"
                self.json(server.batches[name])
            else:
                body = json.loads(self.content)
                server.bodies.append((path, body))
                status, reply = server.answer(body)
                if status == 200:
                    last = (
                        body["messages"][-1]["content"] if "messages" in body else body.get("prompt", body.get("input"))
                    )
                    server.paid[last if isinstance(last, str) else json.dumps(last)] += 1
                self.json(reply, status)

    def saved(self) -> str:
        name = re.search(rb'filename="([^"]+)"', self.content)
        boundary = self.content.split(b"\r\n", 1)[0]
        part = next(p for p in self.content.split(boundary) if b'name="file"' in p)
        assert name
        return self.server_.store(part.split(b"\r\n\r\n", 1)[1][:-2], name[1].decode())

    def created(self) -> dict[str, Any]:
        given, server = json.loads(self.content), self.server_
        made = {
            "id": f"batch-{len(server.batches)}", "object": "batch", "status": "validating", "errors": None, **given,
            "output_file_id": None, "error_file_id": None, "request_counts": {"total": None, "completed": None, "failed": None},
        }  # fmt: skip
        server.batches[made["id"]] = made
        return made

    def listing(self) -> None:
        found = list(self.server_.batches.values())[::-1]
        start = next((i + 1 for i, b in enumerate(found) if b["id"] == self.query.get("after")), 0)
        page = found[start : start + 2]  # small pages, so that paging is used
        self.json({"object": "list", "data": page, "has_more": start + 2 < len(found)})

    def polled(self, name: str) -> None:
        server = self.server_
        batch = server.batches.get(name)
        if batch is None:
            return self.json({"error": {"message": "no such batch"}}, 404)
        if batch["status"] in ("validating", "cancelling"):
            lines = [json.loads(x) for x in server.contents[batch["input_file_id"]].splitlines()]
            if batch["status"] == "cancelling":
                expire("cancelled", 1)(server, batch, lines)
            else:
                server.finish(server, batch, lines)
        return self.json(batch)

    def json(self, data: Any, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(data).encode(), **headers)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


# -- faults ---------------------------------------------------------------------------


def error(status: int, code: str = "", kind: str = "", message: str = "no", **headers: str) -> Fault:
    def fault(handler: Handler) -> bool:
        handler.json({"error": {"message": message, "type": kind, "code": code or None}}, status, **headers)
        return True

    return fault


def raw(content: bytes, status: int = 200) -> Fault:
    def fault(handler: Handler) -> bool:
        handler.send(status, content)
        return True

    return fault


def reset(handler: Handler) -> bool:
    """Close the connection with a reset, before any answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()
    return True


def lost(handler: Handler) -> bool:
    """Do what was asked, and lose the reply."""
    with handler.server_.lock:
        if handler.path.endswith("/batches"):
            handler.created()
        else:
            handler.saved()
    return reset(handler)


def short(handler: Handler) -> bool:
    """Announce more than is sent."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    return reset(handler)


def nothing(handler: Handler) -> bool:
    return False


def dies(handler: Handler) -> bool:
    """Take the whole server down before any answer."""
    handler.server_.die()
    return True


def expire(status: str, keep: int, say: bool = True) -> Callable[[Server, dict[str, Any], list[dict[str, Any]]], None]:
    """End a batch with only some lines done; the others are in the error file if `say`."""

    def finish(server: Server, batch: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        done, rest = lines[:keep], lines[keep:]
        pay(server, done)
        late = {"code": "batch_expired", "message": "This request could not be executed before the window expired."}
        errors = (
            [{"id": "b", "custom_id": x["custom_id"], "response": None, "error": late} for x in rest] if say else []
        )
        batch.update(
            status=status, output_file_id=server.store(written([output_line(x) for x in done])) if done else None,
            error_file_id=server.store(written(errors)),
        )  # fmt: skip
        server.finish = complete

    return finish


KEY = "sk-very-secret-0123456789"


def client(server: Any, folder: Path, **more: Any) -> Any:
    """A client of the server that waits for nothing; one by one, unless `mode` says otherwise."""
    from posttrain.synth import OpenAISynth

    given = {"mode": "online", "concurrency": 8, "poll_every": 0.01, "reconcile_after": 0.01, "api_key": KEY, **more}
    return OpenAISynth(base_url=server.url, work_dir=folder, **given)


def add(made: Any, count: int = 7, task: str = "t", **body: Any) -> Any:
    """Add chats that ask q0, q1, ... to a task of a client, and return the client."""
    for i in range(count):
        made.add_chat_to_batch_task(task_name=task, model="m", messages=[{"role": "user", "content": f"q{i}"}], **body)
    return made


def texts(responses: list[dict[str, Any]]) -> list[str]:
    """What the replies say."""
    return [r["response"]["body"]["choices"][0]["message"]["content"] for r in responses]


def saying(
    text: Callable[[dict[str, Any]], str], **more: Any
) -> Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]:
    """An answer of the server whose text is a function of the body."""

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        reply = chat(body)
        reply["choices"][0]["message"]["content"] = text(body)
        reply["choices"][0] |= more
        return 200, reply

    return answer


def last(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def asked_by(body: dict[str, Any]) -> int:
    """The number of a question that `add` has asked."""
    return int(last(body).removeprefix("q"))


def by_length(body: dict[str, Any]) -> str:
    """A server that answers with a random number, and judges an answer by that number."""
    found = re.search(r"\[Answer to judge\]\n.*?(\d+)", last(body), flags=re.DOTALL)
    if found:
        return json.dumps({"rationale": f"it says {found[1]}", "score": int(found[1]) % 5 + 1})
    return f"{last(body)} {random.randrange(1000)}"
