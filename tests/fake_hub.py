"""A Hub on this machine. It serves the routes that huggingface_hub needs for uploads with LFS, and stores the files."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_LARGE = (".safetensors", ".gguf")
_ANONYMOUS = "/api/agent-harnesses"  # huggingface_hub 1.33 requests this route on its own, without a token


class Hub(ThreadingHTTPServer):
    """One repository.

    Attributes:
        is_there, is_private: whether the repository exists, and whether it is private.
        refuses: whether every token is refused.
        complaint: error message about the card's metadata, or None if the metadata is accepted.
        files: path -> contents of each committed file.
        tokens: access tokens that came with requests about the repository.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.is_there = self.is_private = self.refuses = False
        self.complaint: str | None = None
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._note_token()
        if self.server.refuses:
            self._refuse()
        elif not self.server.is_there:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            files = self.server.files.items()
            self._send(200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files])
        else:
            private = self.server.is_private
            self._send(200, {"id": "me/mine", "private": private, "siblings": [], "sha": "0" * 40, "tags": []})

    def do_PUT(self) -> None:
        content = self._body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._send(200, {})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        self._note_token()
        if hub.refuses:
            self._refuse()
        elif self.path == "/api/validate-yaml" and hub.complaint:
            self._send(400, {"errors": [{"message": hub.complaint}]})
        elif self.path == "/api/repos/create":
            if hub.is_there:
                self._send(409, {"url": f"{hub.url}/me/mine"})
            else:
                hub.is_there, hub.is_private = True, json.loads(body).get("visibility") == "private"
                self._send(200, {"url": f"{hub.url}/me/mine"})
        elif "/preupload/" in self.path:
            paths = [each["path"] for each in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(_LARGE) else "regular" for path in paths}
            self._send(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            self._send(200, {"transfer": "basic", "objects": [{**each, **self._upload(each)} for each in objects]})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._send(200, {"warnings": [], "errors": []})  # the routes that validate the card and verify LFS uploads

    def _upload(self, each: dict[str, Any]) -> dict[str, Any]:
        return {"actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        self._send(200, {"commitUrl": f"{self.server.url}/me/mine/commit/1", "commitOid": "1" * 40, "success": True})

    def _refuse(self) -> None:
        reason = "Invalid credentials in Authorization header"
        self._send(401, {"error": reason}, {"X-Error-Message": reason})

    def _note_token(self) -> None:
        if self.path != _ANONYMOUS:
            self.server.tokens.add(self.headers.get("Authorization", ""))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
