"""The MLflow UI on this machine, from the store that a `Tracker` writes."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

from ffgym.errors import TrackingError
from ffgym.tracking.masking import shown
from ffgym.tracking.store import adopt, artifacts, check_driver, database, is_server, own_uri, tracking_uri

SECONDS_TO_END = 3.0


def open_ui(root: Path, port: int = 5000) -> None:
    """Serve the MLflow UI on this machine until Ctrl-C, from the store that :class:`Tracker` writes.

    Args:
        root: folder of the store.
        port: TCP port on 127.0.0.1.

    Raises:
        TrackingError: there is no store yet, the port is taken, the store is a server that has a UI of its own, or
            MLflow's server gave up.
    """
    uri = tracking_uri(root)
    if is_server(uri):
        raise TrackingError(f"MLFLOW_TRACKING_URI is a server: {shown(uri)}", hint="Open that address in a browser.")
    if uri == own_uri(root):
        if not database(root).is_file():
            raise TrackingError(
                f"no MLflow store in {root.resolve()} yet",
                hint="Make one with `ffgym run`, or name another folder.",
            )
        with contextlib.suppress(sqlite3.Error):  # MLflow says what is wrong with it
            adopt(root)
    check_driver(uri)
    _require_free(port)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(artifacts(root))]
    # Everybody on this machine sees a command line, and the address of a database may hold its password.
    store = {"MLFLOW_BACKEND_STORE_URI": uri}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    server = subprocess.Popen(command, env=quiet | os.environ | store)
    try:
        code = server.wait()
    except KeyboardInterrupt:  # the way to stop it
        _end(server)
        return
    if code != 0:
        raise TrackingError(f"the MLflow UI on port {port} ended with exit code {code}", hint="Its output is above.")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Wait for a server that a terminal has sent Ctrl-C as well; one that was sent nothing is told."""
    for tell in (server.terminate, server.kill):  # MLflow lingers for some 20 seconds after it has stopped serving
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(SECONDS_TO_END)
            return
        tell()
    server.wait()


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise TrackingError(
                f"cannot serve the MLflow UI on port {port}: {error}",
                hint="Choose another with --port (1024 to 65535).",
            ) from error
