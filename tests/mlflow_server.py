"""A real ``mlflow server`` on this machine for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from processes import answers, free_port, until


class MLflowServer:
    """A server with a store of its own, which a test may stop and start again.

    Args:
        folder: where it keeps runs and artifacts.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--artifacts-destination", str(self.folder / "artifacts")]
        own = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        self._process = subprocess.Popen(
            command, env=environment | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        process = self._process
        until(lambda: process.poll() is not None or answers(f"{self.uri}/health"))
        assert process.poll() is None, "the MLflow server has ended"

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[MLflowServer]:
    """A server that is stopped when the block ends."""
    server = MLflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
