"""A server on this machine that speaks OpenAI's chat completions, without a model: to try recipes, offline and free.

`python server.py [PORT]`, then OPENAI_BASE_URL=http://127.0.0.1:8765/v1. What it says means nothing, but has the form
that was asked for, and is another thing each time.
"""

import json
import random
import re
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SEEN: Counter[str] = Counter()
"""How often each question came, so that samples differ."""
TOPICS = ("the sea", "a bicycle", "winter", "an old clock", "bread", "a lighthouse", "rain", "a train", "tea", "maps")
TASKS = ("Write a poem about {}.", "Explain to a child how {} works, in three sentences.", "List five facts about {}.")


def answer(body: dict) -> str:
    """Return a text of the form that a request asks for."""
    asked = body["messages"][-1]["content"]
    SEEN[asked] += 1
    chance = random.Random(f"{asked} {body.get('model')} {SEEN[asked]}")
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    if schema:
        fields = schema["properties"].items()
        return json.dumps({name: chance.choice(f["enum"]) if "enum" in f else "So it seems." for name, f in fields})
    if "instructions" in asked:
        lines = [chance.choice(TASKS).format(chance.choice(TOPICS)) for _ in range(5)]
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    if numbers := re.findall(r"\d+", asked):
        return f"I count {', '.join(numbers)}. The answer is {sum(map(int, numbers)) + chance.choice((0, 0, 1, 10))}."
    return f"Good {chance.choice(('morning', 'day', 'evening'))}, {asked.split()[-1]}!"


class Handler(BaseHTTPRequestHandler):
    """Answers every chat."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        """Answer one request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = answer(body)
        words = len(json.dumps(body["messages"]).split()), len(text.split())
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": words[0], "completion_tokens": words[1], "total_tokens": sum(words)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        content = json.dumps({"object": "chat.completion", "choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve(port: int) -> ThreadingHTTPServer:
    """Return the server; call `serve_forever`."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


if __name__ == "__main__":
    serve(int(sys.argv[1]) if len(sys.argv) > 1 else 8765).serve_forever()
