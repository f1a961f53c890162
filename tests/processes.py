"""Other processes in tests: waited for with patience, and interrupted. Only what hangs passes a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 600.0  # seconds


def until(happened: Callable[[], object]) -> None:
    """Wait for something to happen."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Also where nobody has noticed yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def interrupted(
    command: Sequence[str], number: int, when: Callable[[], object], **options: Any
) -> subprocess.CompletedProcess[str]:
    """Start a command, send its process a signal once something has happened, and wait for its end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        until(lambda: process.poll() is not None or when())
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def fresh(code: str, *arguments: object, hub: Path) -> Any:
    """Run code in a process of its own, offline, with a hub's cache of its own; the JSON of the last line it prints."""
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lines(path: Path) -> int:
    """How many whole lines a file has that may not be there yet."""
    return path.read_text().count("\n") if path.exists() else 0


def answers(address: str) -> bool:
    """Whether a server is up."""
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10):
        return True
    return False


def free_port() -> int:
    """A port that nobody listens on, below those that systems hand out to whoever asks for any."""
    ports = random.Random(os.urandom(8))
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port := ports.randrange(15_000, 30_000)))
            except OSError:
                continue
            return port
