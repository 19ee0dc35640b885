"""A judge for lmms-eval's stock MM-Vet task: reads the authors' wording, grades as the bundled judge does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from corematching.benchmarks.judge import key_phrase_score


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wording = request["messages"][-1]["content"]
        text = wording if isinstance(wording, str) else wording[-1]["text"]
        # The mini suite's texts hold no bars, so that the last line of the wording has exactly three fields.
        _, answer, prediction, _ = (field.strip() for field in text.splitlines()[-1].split(" |"))
        content = str(key_phrase_score(answer, prediction))
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        reply = {"id": "grade", "object": "chat.completion", "created": 0, "model": "stock", "usage": usage}
        data = json.dumps({**reply, "choices": [message]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        """Say nothing."""


@contextmanager
def stock_judge() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
