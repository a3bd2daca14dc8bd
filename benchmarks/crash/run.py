"""Requests that a generator sends in all, when it is killed half way and run again.

    python benchmarks/crash/run.py 'PYTHON benchmarks/crash/of_posttrain.py' ['PYTHON benchmarks/crash/of_curator.py' ...]

A server of 100 ms on this machine counts what it is asked. Each command is killed (SIGKILL, its children too) once 200 of
400 questions were seen, and run again until it ends by itself, three times at most. The commands find the server by URL,
OPENAI_BASE_URL and OPENAI_API_KEY, and write `rows.jsonl` into the current folder, which is a new one.
"""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROWS, HALF = 400, 200


class Counting:
    """Answers after 100 ms, and counts."""

    def __init__(self):
        self.seen, self.port, self.ready = 0, 0, threading.Event()
        threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True).start()
        self.ready.wait()

    async def serve(self):
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await server.serve_forever()

    async def handle(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
                reply = await self.answer(await reader.readexactly(length) if length else b"{}")
                content = json.dumps(reply).encode()
                said = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content)
                writer.write(said + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, body):
        asked = json.loads(body).get("messages") or []
        if "topic" in json.dumps(asked):  # what is no question of ours (a look whether the server is there) is free
            self.seen += 1
            await asyncio.sleep(0.1)
        message = {"role": "assistant", "content": "Something."}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}


def once(command, server, folder, kill):
    """Run a command; return its status, or that it was killed."""
    url = f"http://127.0.0.1:{server.port}/v1"
    environment = {
        **os.environ,
        "URL": url,
        "OPENAI_BASE_URL": url,
        "OPENAI_API_KEY": "sk-none",
        "TELEMETRY_ENABLED": "false",
    }
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            shlex.split(command),
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.time() + 180
    while process.poll() is None:
        if time.time() > end or (kill and server.seen >= HALF):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "killed" if kill else "too slow"
        time.sleep(0.01)
    return process.returncode


def main():
    print(
        f"| command | seen when killed | sent in all, for {ROWS} | runs after the kill | rows in the end |\n|---|---|---|---|---|"
    )
    for command in sys.argv[1:]:
        server = Counting()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            assert once(command, server, folder, kill=True) == "killed", (folder / "log.txt").read_text()[-2000:]
            killed, runs = server.seen, []
            while not runs or (runs[-1] != 0 and len(runs) < 3):
                runs.append(once(command, server, folder, kill=False))
            made = folder / "rows.jsonl"
            rows = len(made.read_text().splitlines()) if made.exists() else 0
        said = ", ".join("ended well" if run == 0 else f"failed ({run})" for run in runs)
        print(f"| {Path(shlex.split(command)[-1]).stem} | {killed} | {server.seen} | {said} | {rows} |", flush=True)


if __name__ == "__main__":
    main()
