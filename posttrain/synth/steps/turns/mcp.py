"""Tools of an MCP server that is a process of this machine: JSON-RPC over its standard input and output.

Source: modelcontextprotocol.io/specification/2025-06-18, basic/lifecycle, basic/transports, server/tools.
"""

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import attrs
from attrs.validators import gt, min_len

from posttrain.errors import SynthError
from posttrain.registry import key
from posttrain.synth.ledger.replies import parsed

VERSION = "2025-06-18"
PATIENCE = 2.0
"""Seconds for a server to end when its input does."""
PASSED = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER")
"""Variables that a server gets to see, besides those that it is given: keys stay here."""


@attrs.frozen(kw_only=True, slots=False)
class McpServer:
    """A server of the Model Context Protocol, over stdio."""

    command: list[str] = key(check=min_len(1))
    """What starts it: `[npx, -y, server-name]`, `[python, server.py]`."""
    env: dict[str, str] = attrs.field(factory=dict, repr=False)
    """Variables of its environment; of yours it sees HOME, PATH and the like, and no keys."""
    only: list[str] = attrs.field(factory=list)
    """Names of the tools to offer; all unless given."""
    timeout: float = key(60.0, check=gt(0))
    """Seconds for each answer."""

    @contextmanager
    def running(self) -> Iterator["Connection"]:
        """Start it, and end it at last.

        Raises:
            SynthError: it does not start, or does not speak the protocol.
        """
        kept = {name: os.environ[name] for name in PASSED if name in os.environ}
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**kept, **self.env}
                )
            except OSError as error:
                raise SynthError(f"the MCP server {self.command[0]} does not start: {error}") from None
            made = Connection(self, process, errors)
            try:
                made.greet()
                yield made
            finally:
                made.close()


class Connection:
    """A server that runs. One call at a time goes over it."""

    def __init__(self, server: McpServer, process: "subprocess.Popen[bytes]", errors: IO[bytes]) -> None:
        self.server, self._process, self._errors = server, process, errors
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._lock, self._number = threading.Lock(), 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def greet(self) -> None:
        """Agree on the protocol."""
        about = {"name": "posttrain", "version": "1"}
        self.ask("initialize", {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": about})
        self._write({"method": "notifications/initialized"})

    def tools(self) -> list[dict[str, Any]]:
        """Return its tools, in OpenAI's form.

        Raises:
            SynthError: it lacks one that was asked for.
        """
        made: dict[str, dict[str, Any]] = {}
        params: dict[str, Any] = {}
        while True:
            page = self.ask("tools/list", params)
            for each in page.get("tools") or []:
                function = {"name": each["name"], "description": each.get("description") or ""}
                function["parameters"] = each.get("inputSchema") or {"type": "object", "properties": {}}
                made[each["name"]] = {"type": "function", "function": function}
            if not page.get("nextCursor"):
                break
            params = {"cursor": page["nextCursor"]}
        if missing := [name for name in self.server.only if name not in made]:
            raise SynthError(f"the MCP server has no tool {missing[0]!r} (it has: {', '.join(made)})")
        return [spec for name, spec in made.items() if not self.server.only or name in self.server.only]

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """Return (what a tool says, whether it failed).

        Raises:
            SynthError: the server is gone, or does not answer.
        """
        try:
            result = self.ask("tools/call", {"name": name, "arguments": arguments})
        except Refusal as refusal:
            return f"Error: {refusal}", True
        parts = [part for part in result.get("content") or [] if isinstance(part, dict)]
        texts = [str(part["text"]) if part.get("type") == "text" else f"[{part.get('type')}]" for part in parts]
        if not texts and "structuredContent" in result:
            texts = [json.dumps(result["structuredContent"], ensure_ascii=False)]
        return "\n".join(texts), bool(result.get("isError"))

    def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its result."""
        with self._lock:
            self._number += 1
            self._write({"id": self._number, "method": method, "params": params})
            until = time.monotonic() + self.server.timeout
            while True:
                said = self._next(until, method)
                if said.get("id") == self._number and "method" not in said:
                    break
                if "id" in said and "method" in said:  # it asks us: whether we are there, or for what we do not offer
                    ours = {"result": {}} if said["method"] == "ping" else {"error": {"code": -32601, "message": "no"}}
                    self._write({"id": said["id"], **ours})
        if isinstance(error := said.get("error"), dict):
            raise Refusal(str(error.get("message") or error))
        result = said.get("result")
        return result if isinstance(result, dict) else {}

    def close(self) -> None:
        """End it: its input ends; one that stays is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(PATIENCE)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.join(2)
        if not self._reader.is_alive():  # a process that it has left behind may hold the other end
            self._process.stdout.close()

    def _next(self, until: float, method: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise SynthError(
                f"the MCP server {self.server.command[0]} has not answered {method} in {self.server.timeout:g} s; "
                "everything that came is kept"
            ) from None
        if line is None:
            raise SynthError(f"the MCP server {self.server.command[0]} has ended during {method}. {self._complaint()}")
        said = parsed(line)
        return said if isinstance(said, dict) else {}

    def _complaint(self) -> str:
        self._errors.seek(0)
        text = self._errors.read()[-500:].decode("utf-8", "replace").strip()
        return f"It said: {text}" if text else "It said nothing on standard error"

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it is gone: the next reading says so
            pass

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


class Refusal(SynthError):
    """The server answered a request with an error."""
