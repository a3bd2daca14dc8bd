"""CPU microseconds per request of the client alone, against a server of 20 ms on this machine.

    python benchmarks/synth.py [--requests 4000] [--lanes 64 256] [--rows 100000]

Client and server are processes of their own; what is printed is the client's process time. `ledger` is posttrain.synth
as shipped, every reply on the disk; the openai SDK takes part where it is installed. `--rows` measures the re-run of a
finished task and the memory of plan and export.
"""

import argparse
import asyncio
import importlib.util
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
REPLY = b'{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"hello there"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(REPLY) + REPLY


class Stub(asyncio.Protocol):
    """Answers each request after 20 ms."""

    def connection_made(self, transport):
        self.transport, self.data = transport, b""

    def data_received(self, data):
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        if found:
            length = next(int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length"))
            if len(rest) >= length:
                self.data = rest[length:]
                asyncio.get_running_loop().call_later(0.02, self.transport.write, ANSWER)


async def serve():
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def ledger(url, count, lanes):
    from posttrain.synth import VllmSynth

    with tempfile.TemporaryDirectory() as folder:
        made = VllmSynth(base_url=url, work_dir=folder, concurrency=lanes)
        for i in range(count):
            made.add_chat_to_batch_task("t", [{"role": "user", "content": f"question {i}"}], model="m")
        made.plan("t")
        began, wall = time.process_time(), time.perf_counter()
        made.run("t")
        spent, wall = time.process_time() - began, time.perf_counter() - wall
        assert made.status("t").done == count
        made.ledger.close()
    return spent, wall


def sdk(url, count, lanes):
    from openai import AsyncOpenAI

    async def work():
        client, numbers = AsyncOpenAI(base_url=url + "/v1", api_key="k"), iter(range(count))

        async def lane():
            for i in numbers:
                await client.chat.completions.create(model="m", messages=[{"role": "user", "content": f"question {i}"}])

        await asyncio.gather(*(lane() for _ in range(lanes)))

    began, wall = time.process_time(), time.perf_counter()
    asyncio.run(work())
    return time.process_time() - began, time.perf_counter() - wall


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def rows(count):
    """Fill a ledger, answer it without a server, and measure the re-run."""
    import httpx

    from posttrain.synth import OpenAISynth

    sent = 0

    def handler(request):
        nonlocal sent
        sent += 1
        return httpx.Response(200, content=REPLY)

    with tempfile.TemporaryDirectory() as folder:
        for turn in ("first", "again"):
            began, wall, before = time.process_time(), time.perf_counter(), sent
            made = OpenAISynth(
                api_key="k-000000", mode="online", transport=httpx.MockTransport(handler), work_dir=folder
            )
            for i in range(count):
                made.add_chat_to_batch_task("t", [{"role": "user", "content": f"question {i}"}], model="m")
            made.run("t")
            counted = sum(1 for _ in made.iter_responses("t"))
            cpu, wall = time.process_time() - began, time.perf_counter() - wall
            print(
                f"| {turn} run of {count:,} | {sent - before:,} sent | {counted:,} results | {cpu:.1f} CPU s | {wall:.1f} s | {peak()} MB |"
            )
            began = time.process_time()
            made.to_jsonl("t", Path(folder) / "out.jsonl")
            print(f"| export | | | {time.process_time() - began:.1f} CPU s | | {peak()} MB |")
            made.ledger.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--lanes", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--one", nargs=4)
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    if arguments.serve:
        return asyncio.run(serve())
    if arguments.one:
        name, url, count, lanes = arguments.one
        spent, wall = {"ledger": ledger, "openai": sdk}[name](url, int(count), int(lanes))
        return print(
            f"| {name} | {lanes} | {spent / int(count) * 1e6:.0f} | {int(count) / wall:.0f} | {peak()} |", flush=True
        )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, Python {platform.python_version()}"
    )
    if arguments.rows:
        return rows(arguments.rows)
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    print("| client | in flight | CPU us per request | requests per s | peak MB |\n|---|---|---|---|---|", flush=True)
    try:
        for lanes in arguments.lanes:
            for name in ("ledger", "openai") if importlib.util.find_spec("openai") else ("ledger",):
                subprocess.run(
                    [sys.executable, __file__, "--one", name, url, str(arguments.requests), str(lanes)], check=True
                )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
