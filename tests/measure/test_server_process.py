"""The process of a server is ended with all that it has started, however the one that started it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import fake_engine
import pytest
from fake_engine import noted
from processes import has_ended, interrupted, until

from ffgym.errors import ModelError
from ffgym.measure.server import Server, running

STARTS_AND_WAITS = """
import sys, time
from pathlib import Path
from ffgym.interrupts import interruptible
from ffgym.measure.server import Server, running
with interruptible(), running(Server("dense", tuple(sys.argv[2:]), "--served-model-name"), Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(600)
"""


def test_sigterm_ends_a_server_that_hangs_and_what_it_has_started(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HANGS", "1")
    server = [sys.executable, fake_engine.__file__, "--model", "x"]
    command = [sys.executable, "-c", STARTS_AND_WAITS, str(tmp_path / "server.log"), *server]
    done = interrupted(command, signal.SIGTERM, lambda: noted(log, "started"))
    assert "KeyboardInterrupt" in done.stderr
    until(lambda: all(has_ended(pid) for line in noted(log, "started") for pid in line["pids"]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent was killed")
def test_a_server_ends_when_the_process_that_started_it_is_killed(log: Path, tmp_path: Path) -> None:
    server = [sys.executable, fake_engine.__file__, "--model", "x"]
    interrupted(
        [sys.executable, "-c", STARTS_AND_WAITS, str(tmp_path / "server.log"), *server],
        signal.SIGKILL,
        lambda: noted(log, "started"),
    )
    (started,) = noted(log, "started")
    own, child = started["pids"]
    until(lambda: has_ended(own))
    os.kill(child, signal.SIGKILL)  # a real engine ends its children on SIGTERM


ENDS_WHEN_ASKED = """
import os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
server = os.getpid()
if os.fork():
    time.sleep(600)
class Other(BaseHTTPRequestHandler):
    def do_GET(self):
        os.kill(server, signal.SIGKILL)
        while os.getppid() == server:
            time.sleep(0.01)
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Other).serve_forever()
"""


def test_an_answer_from_somebody_else_is_not_the_servers(tmp_path: Path) -> None:
    server = Server("dense", (sys.executable, "-c", ENDS_WHEN_ASKED), "--alias")
    with (
        pytest.raises(ModelError, match="'dense' ended with signal 9 before it answered"),
        running(server, tmp_path / "server.log"),
    ):
        pass


LOADS_WHILE_ANOTHER_ANSWERS = """
import os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
if os.fork():
    time.sleep(600)
class Other(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "model"}]}')
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Other).serve_forever()
"""


def test_another_program_on_the_port_is_not_taken_for_a_server_that_still_loads(tmp_path: Path) -> None:
    server = Server("dense", (sys.executable, "-c", LOADS_WHILE_ANOTHER_ANSWERS), "--alias")
    with (
        pytest.raises(ModelError, match=r"'dense' does not answer on its port \d+, but another program does"),
        running(server, tmp_path / "server.log"),
    ):
        pass
