"""A server on this machine that speaks OpenAI's chat completions, without a model: for trying out, offline and free.

`python server.py [PORT]`, then OPENAI_BASE_URL=http://127.0.0.1:8765/v1
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers every chat with a greeting to the last word of its last message."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer one request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words = body["messages"][-1]["content"].split()
        message = {"role": "assistant", "content": f"Good morning, {words[-1]}!"}
        usage = {"prompt_tokens": len(words), "completion_tokens": 4, "total_tokens": len(words) + 4}
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
