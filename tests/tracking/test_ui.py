import json
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow_store import client, new_store
from processes import free_port

from ffgym.errors import TrackingError
from ffgym.tracking.store import tracking_uri
from ffgym.tracking.tracker import Tracker
from ffgym.tracking.ui import open_ui


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return new_store(tmp_path / "ml runs")


def test_every_experiment_has_the_view_of_its_runs(root, monkeypatch):
    with Tracker(root, "ffgym", "run"):
        pass
    client(root).create_experiment("of an earlier version", artifact_location=str(root / "artifacts"))
    Server(monkeypatch)
    open_ui(root, "of an earlier version", browser=False)
    for name in ("ffgym", "of an earlier version"):
        tags = client(root).get_experiment_by_name(name).tags
        assert tags["mlflow.experimentKind"] == "custom_model_development"
        view = json.loads(tags["mlflow.sharedViewState.ffgym"])
        assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`result/perplexity`", True)
        assert {"params.`agent`", "metrics.`result/sparsity`"} <= set(view["selectedColumns"])


def test_the_root_is_a_folder_and_no_address(root):
    with pytest.raises(TrackingError, match=r"postgresql:\.\.\. is an address.*\n.*MLFLOW_TRACKING_URI") as refused:
        Tracker(Path("postgresql://user:secret@host/db"), "ffgym", "run")
    assert "secret" not in str(refused.value)


def test_ui_without_a_store_says_how_to_get_one(root, tmp_path):
    with pytest.raises(TrackingError, match=r"no MLflow store.*\n.*ffgym run"):
        open_ui(tmp_path)


def test_ui_on_a_taken_port_is_refused(root):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrackingError, match="port"):
            open_ui(root, port=taken.getsockname()[1])


class Server:
    """Stands in for MLflow's process."""

    def __init__(self, monkeypatch, *, code=0, stubborn=0):
        self.commands, self.environments, self.told = [], [], []
        self.code, self.stubborn = code, stubborn
        monkeypatch.setattr(subprocess, "Popen", self)

    def __call__(self, command, env):
        self.commands.append(command)
        self.environments.append(env)
        return self

    def poll(self):
        return self.code

    def wait(self, timeout=None):
        if timeout is None and self.stubborn and not self.told:
            self.told.append("Ctrl-C")
            raise KeyboardInterrupt
        if len(self.told) < self.stubborn:
            raise subprocess.TimeoutExpired("mlflow", timeout)
        return self.code

    def terminate(self):
        self.told.append("terminate")

    def kill(self):
        self.told.append("kill")


def test_ui_serves_the_same_store_and_tells_when_it_gave_up(root, monkeypatch):
    server = Server(monkeypatch)
    open_ui(root, port=0)
    (command,), (environment,) = server.commands, server.environments
    assert command[:4] == [sys.executable, "-m", "mlflow", "ui"]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == tracking_uri(root)
    assert not [word for word in command if "mlflow.db" in word], "everybody sees a command line"
    Server(monkeypatch, code=1)
    with pytest.raises(TrackingError, match="exit code 1"):
        open_ui(root, port=0)


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


class Answering(Server):
    """Says that it is up, to whoever asks it."""

    def __call__(self, command, env):
        self.http = HTTPServer(("127.0.0.1", int(command[command.index("--port") + 1])), Healthy)
        Thread(target=self.http.serve_forever, daemon=True).start()
        self.polls = iter([None] * 50)
        return super().__call__(command, env)

    def poll(self):
        return next(self.polls, self.code)

    def wait(self, timeout=None):
        self.http.shutdown()
        self.http.server_close()
        return self.code


def test_the_page_is_shown_behind_a_proxy_too(root, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    said = []
    Answering(monkeypatch)
    open_ui(root, port=free_port(), notify=said.append, browser=False)
    assert said[0].startswith("The runs are shown at")


@pytest.mark.parametrize("signals", [["Ctrl-C"], ["Ctrl-C", "terminate"], ["Ctrl-C", "terminate", "kill"]])
def test_ctrl_c_closes_the_ui_in_peace(root, monkeypatch, signals):
    server = Server(monkeypatch, stubborn=len(signals))
    open_ui(root, port=0)
    assert server.told == signals
