"""The server process of one model: it is started on loopback, answers, and is ended with all that it has started.

A server is a command line that takes ``--host``, ``--port`` and an option for the name of its model. It answers
``/health`` once the model is loaded, lists that name in ``/v1/models``, and streams completions from
``/v1/completions``, as OpenAI's does.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffgym.errors import ModelError
from ffgym.interrupts import held_back_interrupts

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
HOST = "127.0.0.1"
START_SECONDS = 900
END_SECONDS = 15
LAST_LINES = 15
MOST_REASONS = 4
REASON = re.compile(r"(?:\b[\w.]*(?:Error|Exception): |Value error, ).*")  # the second is under one of pydantic's


@dataclass(frozen=True)
class Server:
    """One model in one engine."""

    role: str  # which model it is, e.g. "dense"
    command: tuple[str, ...]  # starts it, name and address aside
    name_option: str  # the option for the name of its model, e.g. "--alias"
    body: Mapping[str, Any] = field(default_factory=dict)  # what requests say beside prompt and length
    # variables that differ from those of this process; None unsets one
    environment: Mapping[str, str | None] = field(default_factory=dict)
    weights: int = 0  # their bytes on disk


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    server: Server
    name: str  # of its model; no other server has it
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    def ending(self, seconds: float = 0) -> str | None:
        """How it ended, e.g. ``"ended with signal 9"``; ``None`` where it still runs after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(seconds)
            return f"ended with signal {-status}" if status < 0 else f"ended with exit status {status}"
        return None

    def failed(self, what: str) -> ModelError:
        """The error for a server that does not do what it should."""
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        last = text.splitlines()[1:][-LAST_LINES:] or ["nothing"]
        reasons = list(dict.fromkeys(REASON.findall(text)))[:MOST_REASONS] or last
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".log", prefix="ffgym-", delete=False) as log:
            log.write(text)
        return ModelError(
            "\n  ".join([f"the server of the model {self.server.role!r} {what}; it printed:", *reasons]),
            hint=f"Read its log, which begins with the command that started it: {log.name}",
        )


@contextmanager
def running(server: Server, log: Path) -> Iterator[Running]:
    """Start a server, wait until it answers, and end it with everything that it has started.

    Raises:
        ModelError: it ends by itself, does not answer within `START_SECONDS`, or another program has its port.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    changes = {"HF_HUB_OFFLINE": "1", **server.environment}
    name = f"ffgym-{secrets.token_hex(4)}"
    command = (*server.command, server.name_option, name, "--host", HOST, "--port", str(port))
    unset = [f"-u{key}" for key, value in changes.items() if value is None]  # env takes its options first
    by_hand = ["env", *unset, *(f"{key}={value}" for key, value in changes.items() if value is not None)]
    process: subprocess.Popen[bytes] | None = None
    try:
        # In a process group of its own: Ctrl-C reaches only this process, which then ends the whole group.
        with log.open("wb", buffering=0) as output, held_back_interrupts():
            output.write(f"{shlex.join([*by_hand, *command])}\n".encode())
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={key: value for key, value in {**os.environ, **changes}.items() if value is not None},
                start_new_session=True,
                preexec_fn=None if C_LIBRARY is None else _end_with_parent,
            )
        started = Running(server, name, port, log, process)
        _wait(started)
        yield started
    finally:
        if process is not None:
            _end(process)


def _wait(started: Running) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if (ending := started.ending()) is not None:
            raise started.failed(f"{ending} before it answered")
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _got(started.port, "/health")[0] == http.client.OK:
                status, models = _got(started.port, "/v1/models")
                if started.name.encode() in models:
                    return
                # It takes the port only when it has loaded its model, and another program may have it by then.
                if started.ending() is None:
                    raise started.failed(
                        f"does not answer on its port {started.port}, but another program does: its /v1/models"
                        f" (status {status}) does not name {started.name}"
                    )
        time.sleep(0.1)
    raise started.failed(f"did not answer within {START_SECONDS // 60} minutes")


def _got(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def _end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent is killed, which cannot end it any more."""
    assert C_LIBRARY is not None
    C_LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    with held_back_interrupts():
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
