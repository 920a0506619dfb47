"""An engine for tests. It answers like OpenAI's API, or has the fault that FAKE_ENGINE names.

It starts two child processes, one of which leaves the process group. It writes the ids of all three processes to the
file that FAKE_PIDS names.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULT = os.environ.get("FAKE_ENGINE", "")
STARTED = time.monotonic()
LATE_SECONDS = 0.6
ANSWER = {
    "choices": [{"message": {"content": "19", "reasoning_content": "12 + 7 = 19"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 3},
}
RAW = "<|channel|>analysis<|message|>12 + 7 = 19<|end|><|start|>assistant<|channel|>final<|message|>nineteen<|return|>"
RAW_ANSWER = {"choices": [{"message": {"content": RAW}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
ANSWERS: dict[str, Any] = {"rubbish": "<html>Not here</html>", "other": {"answer": 19}, "raw": RAW_ANSWER}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        is_up = FAULT != "never" and (FAULT != "late" or time.monotonic() - STARTED > LATE_SECONDS)
        body = {"data": [{"id": "fake"}]} if self.path == "/v1/models" else {}
        self._send(200 if is_up else 503, body)

    def do_POST(self) -> None:
        print(f"dated {os.environ.get('VLLM_SYSTEM_START_DATE')}", flush=True)
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        print(f"asked {asked}", flush=True)
        if FAULT == "hang":
            time.sleep(60)
        if FAULT == "crash_when_asked":
            os._exit(9)
        self._send(500 if FAULT == "error" else 200, ANSWERS.get(FAULT, ANSWER))
        if FAULT == "crash_later":
            os._exit(5)

    def _send(self, status: int, body: Any) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    sleep = ["sleep", "600"]
    children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
    if "FAKE_PIDS" in os.environ:
        Path(os.environ["FAKE_PIDS"]).write_text(
            " ".join(str(each) for each in (os.getpid(), *(c.pid for c in children)))
        )
    print("loading\n" + "\n".join(f"shard {i}" for i in range(40)), flush=True)
    if FAULT == "crash":
        time.sleep(LATE_SECONDS)
        sys.exit("out of memory")
    if FAULT == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
