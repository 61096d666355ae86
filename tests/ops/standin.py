"""A process that passes for ``kvbelt worker`` and ``kvbelt proxy``: it serves /health on --port and nothing else.

How it misbehaves is said in the environment, per name of the role: STANDIN_DIE, STANDIN_IGNORE_TERM,
STANDIN_LOADING (a file: it says ``loading`` until the file exists), STANDIN_OPEN (requests that a proxy never ends).
What it answers to a POST and to a GET of a record are files, too: STANDIN_STREAM, STANDIN_RECORD.
"""

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def option(name: str) -> str:
    """The value of ``name`` on the command line."""
    return sys.argv[sys.argv.index(name) + 1]


role = option("--role") if sys.argv[1] == "worker" else "proxy"
sys.stderr.write(f"I am {role}\n")
if role in os.environ.get("STANDIN_IGNORE_TERM", ""):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if role in os.environ.get("STANDIN_DIE", ""):
    for number in range(100):
        sys.stderr.write(f"line {number}\n")
    sys.stderr.write("the reason\n")
    sys.exit(7)


class Health(BaseHTTPRequestHandler):
    """Answers every GET with a state."""

    def do_GET(self) -> None:
        """``ready``, or ``loading`` until the file exists."""
        if self.path.startswith("/kvbelt/requests/"):
            self.answer(200, Path(os.environ["STANDIN_RECORD"]).read_bytes())
            return
        if self.path == "/v1/models":
            self.answer(200, b'{"data": [{"id": "standin"}]}')
            return
        self.health()

    def health(self) -> None:
        """Of a worker or the proxy."""
        waits_for = os.environ.get("STANDIN_LOADING")
        ready = waits_for is None or Path(waits_for).exists()
        state = "ready" if ready else "loading"
        if role == "proxy":
            notifications = {"port": 7500, "mechanism": "NULL"}
            body = {"status": "ok", "state": state, "notifications": notifications, "workers": [],
                    "open_requests": int(os.environ.get("STANDIN_OPEN", "0"))}  # fmt: skip
        else:
            load = {"running": 0, "waiting": 0, "blocks_total": 1, "blocks_free": 1, "blocks_cached": 0}
            body = {"status": "ok", "state": state, "role": role, "model": "standin", "engine_id": role,
                    "engine": "embedded", "hash_seed": "", "receiver": None, "max_model_len": 100,
                    "load": load}  # fmt: skip
        self.answer(200 if ready else 503, json.dumps(body).encode())

    def do_POST(self) -> None:
        """The stream of the file, or an error without one."""
        if self.path == "/kvbelt/drain":
            self.health()
            return
        self.rfile.read(int(self.headers["content-length"]))
        stream = os.environ.get("STANDIN_STREAM")
        if stream is None:
            self.answer(503, b'{"error": {"message": "no worker"}}')
        else:
            self.answer(200, Path(stream).read_bytes())

    def answer(self, status: int, body: bytes) -> None:
        """One whole answer."""
        self.send_response(status)
        self.send_header("x-request-id", "r1")
        self.send_header("x-kvbelt-path", "first-token")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


HTTPServer((option("--host"), int(option("--port"))), Health).serve_forever()
