"""A server as the engines' are, without a model: tokens at a fixed pace, and what it was asked in the file FAKE_LOG.

Run with ``-c`` it is a Python that has vLLM FAKE_VERSION, and a GPU called FAKE_GPU. FAKE_DIES (what it says then),
FAKE_TOKENS, FAKE_REFUSES, FAKE_HANGS, FAKE_KILLED (amid an answer) change what it does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FIRST_SECONDS, NEXT_SECONDS = 0.1, 0.01


def note(**what: Any) -> None:
    with Path(os.environ["FAKE_LOG"]).open("a", encoding="utf-8") as log:
        log.write(json.dumps(what) + "\n")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if "FAKE_HANGS" in os.environ else 200)
        self.end_headers()
        if self.path == "/v1/models":
            self.wfile.write(json.dumps({"data": [{"id": after("--served-model-name")}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note(asked=MODEL, prompt=body["prompt"], ignore_eos=body["ignore_eos"], arguments=sys.argv)
        if "FAKE_REFUSES" in os.environ or body["model"] != after("--served-model-name"):
            self.send_error(400, "no such prompt")
            return
        self.send_response(200)
        self.end_headers()
        tokens = int(os.environ.get("FAKE_TOKENS", body["max_tokens"]))
        for index in range(tokens):
            time.sleep(NEXT_SECONDS if index else FIRST_SECONDS)
            self.say({"choices": [{"text": "" if index == 0 else "a"}]})
            if "FAKE_KILLED" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
        self.say({"choices": [], "usage": {"completion_tokens": tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


def noted(log: Path, kind: str) -> list[dict[str, Any]]:
    """What servers have noted of this kind."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [line for line in lines if kind in line]


def after(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1]


if __name__ == "__main__":
    if sys.argv[1] == "-c":
        version, gpu = os.environ.get("FAKE_VERSION", "9.9"), os.environ.get("FAKE_GPU")
        print("a warning of a library", f"vllm-fake {version}", gpu, sep="\n")
        sys.exit()
    MODEL = after("--model")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as engines have
    note(started=MODEL, pids=[os.getpid(), child.pid])
    if "FAKE_DIES" in os.environ:
        sys.exit(os.environ["FAKE_DIES"])
    ThreadingHTTPServer(("127.0.0.1", int(after("--port"))), Handler).serve_forever()
