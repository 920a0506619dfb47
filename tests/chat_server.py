"""A local server with OpenAI's chat API. Tests may set its replies."""

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """A reply of the server."""

    body: Any = None  # text, or an object to send as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after_seconds: float = 0.0


def completion(content: Any = "5", finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}],
        "usage": {"completion_tokens": 3},
    }


GOOD = Reply(completion())
MODELS = Reply({"object": "list", "data": [{"id": "tiny", "object": "model"}]})


class Server(ThreadingHTTPServer):
    """Sends its replies in turn, then repeats the last reply. Stores all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = MODELS
        self.replies: list[Reply] = [GOOD]
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.at: list[float] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that gave up. Otherwise the traceback would appear in the output of a later test."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_reply(self, path: str, body: Any, headers: dict[str, str]) -> Reply:
        with self.lock:
            self.asked.append((path, body, headers))
            self.at.append(time.monotonic())
            if path.endswith("/models"):
                return self.models
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def bodies(self) -> list[Any]:
        return [body for _, body, _ in self.asked]

    def __enter__(self) -> "Server":
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._send(None)

    def do_POST(self) -> None:
        self._send(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _send(self, body: Any) -> None:
        reply = self.server.next_reply(self.path, body, dict(self.headers))
        with self.server.lock:
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        time.sleep(reply.after_seconds)
        with self.server.lock:
            self.server.busy -= 1
        content = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
