"""The MLflow UI, opened at the page of the runs: on this machine, or on the server that the store is behind."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path

from ffgym.errors import TrackingError
from ffgym.tracking.masking import shown
from ffgym.tracking.store import artifacts, is_server, reading_store, tracking_uri
from ffgym.tracking.view import arrange, page
from ffgym.types import Notify

SECONDS_TO_END = 3.0


def open_ui(
    root: Path, experiment: str = "ffgym", port: int = 5000, *, notify: Notify = print, browser: bool = True
) -> None:
    """Open the page of an experiment's runs; unless the store is behind a server, serve it here until Ctrl-C.

    Args:
        root: folder of the store that :class:`Tracker` writes; ``MLFLOW_TRACKING_URI`` wins.
        browser: open the page in a browser, where there is a screen.

    Raises:
        TrackingError: there is no store yet, the port is taken, or MLflow's server gave up.
    """
    uri = tracking_uri(root)
    if is_server(uri):
        _show(_page(root, experiment, shown(uri).replace("***@", "").removesuffix("?***")), notify, browser)
        return
    address = f"http://127.0.0.1:{port}"
    place = _page(root, experiment, address)
    _require_free(port)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", str(artifacts(root)), "--uvicorn-opts", "--log-level warning"]
    # Every user of this machine can see command lines, and a database's address may hold its password.
    store = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_REGISTRY_STORE_URI": uri}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    server = subprocess.Popen(command, env=quiet | os.environ | store)
    try:
        if _comes_up(server, address):
            _show(place, notify, browser)
            notify("Ctrl-C ends it.")
        code = server.wait()
    except KeyboardInterrupt:  # the way to stop it
        _end(server)
        return
    if code != 0:
        raise TrackingError(f"the MLflow UI on port {port} ended with exit code {code}", hint="Its output is above.")


def _page(root: Path, experiment: str, address: str) -> str:
    """Where the runs are shown; of an experiment that is not there, all that there is."""
    with reading_store(root, "open") as (client, _):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return address
        arrange(client, found)
        return page(address, found.experiment_id)


def _show(place: str, notify: Notify, browser: bool) -> None:
    notify(f"The runs are shown at {place}")
    has_screen = sys.platform != "linux" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if browser and has_screen:  # without a screen, Python would open one in the terminal
        webbrowser.open(place)


def _comes_up(server: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until the server answers; it may also give up."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy does not lead to this machine
    while server.poll() is None:
        with contextlib.suppress(OSError), direct.open(f"{address}/health", timeout=1):
            return True
        time.sleep(0.2)
    return False


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
        except OSError as error:
            raise TrackingError(
                f"cannot serve the MLflow UI on port {port}: {error}",
                hint="Choose another with --port (1024 to 65535).",
            ) from error
