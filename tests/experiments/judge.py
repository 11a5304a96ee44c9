"""A judge that speaks OpenAI's chat completions, on this machine and a free port."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class JudgeServer(ThreadingHTTPServer):
    """Answers every question with ``says``; keeps what it was asked in ``asked``.

    ``failures`` are status codes to answer with first; ``says`` may be a function of the prompt.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict, dict]] = []
        self.failures: list[int] = []
        self.says: str | Callable[[str], str] = "Well. Rating: [[7]]"
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        if self.server.failures:
            self._answer(self.server.failures.pop(0), b"try later")
            return
        says = self.server.says
        text = says if isinstance(says, str) else says(body["messages"][-1]["content"])
        answer = {
            "model": "judge-2024-05-13",
            "system_fingerprint": "fp_1",
            "choices": [{"message": {"role": "assistant", "content": text}}],
        }
        self._answer(200, json.dumps(answer).encode())

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def judge_server():
    with JudgeServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
