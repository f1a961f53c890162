"""What is refused before anything is computed, and that one worker needs no Ray."""

from __future__ import annotations

import sys
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import Any

import gymnasium
import pytest
from glass_runs import glass_config
from processes import free_port
from rich.console import Console

from ffgym import run
from ffgym.config.tables import WorkersTable
from ffgym.config.toml import load_config, to_toml
from ffgym.errors import ConfigError, OutputError, WorkerError
from ffgym.execute.ray import Workers, connected
from ffgym.prepare.workers import cluster_of, report_crowded_cores, report_idle_workers


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)


def refusal(table: WorkersTable, device: str = "cpu") -> str:
    with pytest.raises((ConfigError, WorkerError)) as raised, cluster_of(table, device, print):
        pass
    return str(raised.value)


def test_one_worker_is_this_process(without_ray: None) -> None:
    with cluster_of(WorkersTable(), "cpu", print) as cluster:
        assert cluster is None


def test_more_workers_name_the_extra(without_ray: None) -> None:
    assert "pip install 'ffgym[ray]'" in refusal(WorkersTable(count=2))


def test_a_cluster_that_one_worker_does_not_use_is_named(without_ray: None) -> None:
    said: list[str] = []
    with cluster_of(WorkersTable(ray_address="auto"), "cpu", said.append) as cluster:
        assert cluster is None
    assert said == ["one worker is this process: the Ray cluster at auto is not used"]


def test_an_environment_with_the_config_of_a_run_on_a_cluster_can_do_without_it(
    without_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(glass_config(tmp_path, workers={"count": 2, "ray_address": "auto"})), encoding="utf-8")
    env = gymnasium.make("ffgym/Pruning-v0", config=load_config(file), num_workers=1)
    env.reset(seed=0)
    env.close()
    assert "the Ray cluster at auto is not used" in capsys.readouterr().err


NOBODY, NO_ONE = (f"127.0.0.1:{free_port()}" for _ in range(2))


@pytest.mark.parametrize(
    "address", [NOBODY, f"ray://{NOBODY}", "no.such.host.invalid:6379"], ids=["port", "ray", "host"]
)
def test_an_address_that_nobody_answers(address: str) -> None:
    said = refusal(WorkersTable(count=2, ray_address=address))
    assert said.startswith(f"no Ray cluster answers at {address}: ")
    assert "--ray-address ''" in said, "of a run that is resumed, it cannot be left out"
    assert ("ray[client]" in said) == address.startswith("ray://"), "without it a head starts, and says nothing"


def test_an_address_where_something_else_listens() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        said = refusal(WorkersTable(count=2, ray_address=address))
        server.shutdown()
    assert said.startswith(f"no Ray cluster answers at {address}: something else listens there")


class SpeaksGrpc(BaseRequestHandler):
    """Says as much as tells a Ray from anything else."""

    def handle(self) -> None:
        self.request.sendall(b"\0\0\0\4\0\0\0\0\0")


@pytest.mark.parametrize(
    ("answer", "hints"),
    [
        ("ray client connection timeout", ["RAY_AUTH_MODE=token", "10001"]),  # the cluster does not say which
        ("Starting Ray client server failed. See ray_client_server_23000.err for detailed logs.", ["too slow"]),
        ("a version mismatch", ["RAY_AUTH_MODE=token", "the same Python and Ray"]),
    ],
    ids=["timeout", "server", "other"],
)
def test_a_cluster_that_cannot_be_joined(answer: str, hints: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def init(**options: Any) -> None:
        warnings.warn("as Ray's client does", stacklevel=1)
        raise ConnectionError(answer)

    monkeypatch.setattr(ray, "init", init)
    with ThreadingTCPServer(("127.0.0.1", 0), SpeaksGrpc) as server, warnings.catch_warnings(record=True) as warned:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"ray://127.0.0.1:{server.server_address[1]}"
        said = refusal(WorkersTable(count=2, ray_address=address))
        server.shutdown()
    assert said.startswith(f"cannot join the Ray cluster at {address}: {answer}")
    assert all(hint in said for hint in hints)
    assert ("Python" in said) == ("Python" in hints[-1])
    assert not warned


def test_a_temporary_folder_that_is_too_long_for_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 80)))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray makes a token, and sets this
    said: list[str] = []
    with pytest.raises(WorkerError, match="Ray did not start") as raised, connected(Workers(2), said.append):
        pass
    assert "RAY_TMPDIR=/tmp" in str(raised.value.hint)
    assert len(said) == 1, "it is not tried again"


def test_a_word_is_no_ray_address() -> None:
    assert "'here' is no Ray address" in refusal(WorkersTable(count=2, ray_address="here"))


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a cluster of this machine would be noted
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = refusal(WorkersTable(count=2, ray_address="auto"))
    assert said.startswith("no Ray cluster is noted on this machine")
    assert "--temp-dir" in said, "where it is noted in a folder that nobody else knows"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(NOBODY)  # as one that was killed leaves it
    assert refusal(WorkersTable(count=2, ray_address="auto")).startswith(f"no Ray cluster answers at {NOBODY}: ")
    monkeypatch.setenv("RAY_ADDRESS", NO_ONE)
    assert refusal(WorkersTable(count=2, ray_address="auto")).startswith(f"no Ray cluster answers at {NO_ONE}: ")


def test_a_used_output_folder_is_refused_before_ray_is_started(without_ray: None, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("of an earlier run")
    with pytest.raises(OutputError, match="exists and is not empty"):
        run(glass_config(tmp_path, workers={"count": 2}), progress=Console(quiet=True))


def test_one_device_for_several_workers() -> None:
    assert "model.device = 'cuda:1' is one device, and 2 workers need one each" in refusal(
        WorkersTable(count=2), "cuda:1"
    )


def test_surplus_workers_are_named() -> None:
    said: list[str] = []
    report_idle_workers(8, 8, said.append)
    report_idle_workers(1, 3, said.append)
    report_idle_workers(2, 3, said.append)
    report_idle_workers(1, 2, said.append, 2)
    report_idle_workers(8, 4, said.append, 2)
    assert said == [
        "2 of 3 workers have nothing to do: an update is 1 episode",
        "1 of 3 workers has nothing to do: an update is 2 episodes",
        "while slopes are followed, 2 of 4 workers have nothing to do: an update is one episode of 2 windows",
    ]


def test_more_threads_than_cores_are_named() -> None:
    said: list[str] = []
    report_crowded_cores(2, 1, 2, said.append)
    report_crowded_cores(8, 4, 32, said.append)
    report_crowded_cores(2, 2, 2, said.append)
    report_crowded_cores(8, 1, 4, said.append)
    assert said == [
        "2 workers with 2 threads each slow each other down on 2 cores: set OMP_NUM_THREADS=1, or use fewer workers",
        "8 workers with 1 thread each slow each other down on 4 cores: set OMP_NUM_THREADS=1, or use fewer workers",
    ]


@pytest.mark.parametrize(("name", "options"), [("make", {}), ("make_vec", {"num_envs": 1})])
def test_those_of_an_environment_are_named(
    name: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerError, match="'here' is no Ray address"):
        getattr(gymnasium, name)("ffgym/Pruning-v0", num_workers=3, workers={"ray_address": "here"}, **options)
    assert "2 of 3 workers have nothing to do: an update is 1 episode" in capsys.readouterr().err
