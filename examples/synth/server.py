"""A server on this machine that speaks OpenAI's protocol, without a model: to try recipes, offline and free.

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


def answer(body: dict) -> str | dict:
    """Return a text of the form that a request asks for, or the arguments of a tool to call."""
    asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    SEEN[asked] += 1
    chance = random.Random(f"{asked} {body.get('model')} {SEEN[asked]}")
    if "messages" not in body:  # the text goes on from the beginning of a user's turn
        return chance.choice(TASKS).format(chance.choice(TOPICS))
    if body.get("tools") and body["messages"][-1]["role"] == "user":
        return {"city": (re.findall(r" in (\w+) ", asked) or ["Oslo"])[0]}
    if body["messages"][-1]["role"] == "tool":
        return f"The tool says: {asked}"
    if "You play the user" in asked:
        return chance.choice(("[END]", "And how warm is it?"))
    if "Write the next step" in asked:
        total = sum(map(int, re.findall(r"\d+", asked.partition("Steps so far")[0])))
        last = f"The answer is: {total + chance.choice((0, 0, 1))}."
        return chance.choice(("Add the numbers.", f"That is {total} or so.", last))
    if "new instruction alone" in asked or "instruction alone" in asked or "says alone" in asked:
        return chance.choice(TASKS).format(chance.choice(TOPICS)) + f" Use {chance.randint(20, 300)} words."
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


def message(said: str | dict, body: dict) -> dict:
    """Return a text, or a call of the first tool, as what a choice holds."""
    if isinstance(said, str):
        return {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    function = {"name": body["tools"][0]["function"]["name"], "arguments": json.dumps(said)}
    call = {"id": f"call-{len(body['messages'])}", "type": "function", "function": function}
    return {"message": {"role": "assistant", "content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}


class Handler(BaseHTTPRequestHandler):
    """Answers every chat."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        """Answer one request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = answer(body)
        words = len(json.dumps(body).split()), len(str(said).split())
        usage = {"prompt_tokens": words[0], "completion_tokens": words[1], "total_tokens": sum(words)}
        choice = {"index": 0, "finish_reason": "stop", "text": said}
        if "messages" in body:
            choice = {"index": 0, **message(said, body)}
        content = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
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
