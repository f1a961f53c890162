"""Ray when more than a worker goes: machines that leave and join, and a run that is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from glass_runs import glass_config, glass_tables, untimed
from processes import PATIENCE, free_port, lines, until
from ray_standins import Standin, patiently
from rich.console import Console

import ffgym
from ffgym.errors import WorkerError
from ffgym.evaluation.evaluator import Request
from ffgym.execute.ray import Workers, connected
from ffgym.plugins import discovery

pytestmark = pytest.mark.slow
EPISODES = 100_000
MARK = "FFGYM_TEST_MARK"


def test_ray_may_take_long_to_start_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one try leaves, as Ray does, must not compete with the next."""
    import ray

    starts: list[subprocess.Popen[bytes]] = []
    said: list[str] = []

    def too_late(**options: Any) -> None:
        assert options["address"] == "local"
        assert all(earlier.poll() is not None for earlier in starts)
        command = [sys.executable, "-c", "print(flush=True); input()", *ray.__path__]
        starts.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert starts[-1].stdout is not None
        starts[-1].stdout.readline()  # for a moment a new process has no command line that names Ray
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", too_late)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with (
            pytest.raises(WorkerError, match=r"Ray did not start on this machine: The current node timed") as raised,
            connected(Workers(2), said.append),
        ):
            pass
        assert other.poll() is None
    assert "busy" in str(raised.value.hint)
    assert said[1:] == ["Ray did not start (The current node timed out during startup.): trying again"] * 2
    assert len(starts) == 3
    assert all(each.poll() is not None for each in starts)


def test_a_machine_leaves_and_another_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    machine: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}
    head = {**machine, "num_cpus": 0, "include_dashboard": False}
    machines = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))

    def add() -> Any:
        return patiently(lambda: machines.add_node(**machine))

    first, _ = add(), add()
    said: list[str] = []
    try:
        with connected(Workers(2, address=machines.address), said.append) as cluster:
            executor = cluster.executor(Standin(tmp_path), Standin(tmp_path), (0,))
            asked = [Request((i,), (0,)) for i in range(1, 5)]

            def measured_by(workers: set[str]) -> bool:
                assert [e.loss for e in executor.measure(asked)] == [1.0, 2.0, 3.0, 4.0]
                workers |= {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}
                return len(workers) == 2

            until(lambda: measured_by(set()))
            machines.remove_node(first)
            until(lambda: measured_by(set()) and len(said) > 2)
            assert said[0].startswith("connecting to Ray at ")
            assert said[1] == "loading the model in 2 workers"
            assert said[2].startswith("worker ")
            (tmp_path / "log").unlink()
            add()
            until(lambda: measured_by(set()))
    finally:
        machines.shutdown()


def test_from_outside_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc", reason="Ray's client, ray://, needs grpcio")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    port = free_port()
    head = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
    machines = patiently(lambda: Cluster(initialize_head=True, head_node_args={**head, "ray_client_server_port": port}))
    said: list[str] = []
    try:
        until(lambda: listens(port))
        workers = Workers(2, address=f"ray://127.0.0.1:{port}")
        with contextlib.ExitStack() as stack:
            cluster = patiently(lambda: stack.enter_context(connected(workers, said.append)))
            said.clear()
            executor = cluster.executor(Standin(tmp_path), Standin(tmp_path, is_worker=False), (0,))
            (tmp_path / "die").touch()
            asked = [Request((i,), (0,)) for i in range(5)]
            until(lambda: [e.loss for e in executor.measure(asked)] == [0, 1, 2, 3, 4] and len(said) > 1)
            machines.head_node.kill_raylet()
            with pytest.raises(WorkerError, match="the connection to the Ray cluster is lost"):
                until(lambda: not executor.measure(asked))
    finally:
        machines.shutdown()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


FORGETFUL = """
import json, sys
import gymnasium
import ffgym.envs

for workers in (1, 2):
    envs = gymnasium.make_vec("ffgym/Pruning-v0", num_envs=3, num_workers=workers, **json.loads(sys.argv[1]))
    envs.reset(seed=3)
    envs.action_space.seed(3)
    _, rewards, _, _, infos = envs.step(envs.action_space.sample())
    print(rewards.tolist(), infos["final_info"]["loss"].tolist())
"""


def test_environments_of_a_script_that_never_closes_them_have_workers_and_leave_none(tmp_path: Path) -> None:
    tables = glass_tables(tmp_path)
    given = {name: tables[name] for name in ("model", "data", "prune", "search")}
    environment = {**os.environ, discovery.ENVIRONMENT_VARIABLE: "", MARK: f"{tmp_path}"}
    command = [sys.executable, "-c", FORGETFUL, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    alone, shared = done.stdout.splitlines()
    assert alone == shared
    assert "Exception" not in done.stderr
    assert "Started a local Ray instance" not in done.stderr
    until(lambda: not workers_of(f"{tmp_path}"))


def test_a_run_that_is_interrupted_goes_on_with_another_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """What goes on is stopped after some more episodes, and so is a run of one process that it is compared with."""
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, "")
    changes: dict[str, Any] = {"agent": {"name": "random"}, "search": {"episodes": EPISODES}}
    changes["output"] = {"save_model": False}
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(glass_tables(tmp_path, **changes)), encoding="utf-8")
    command = [sys.executable, "-m", "ffgym", "run", "--config", str(file), "--workers", "2"]
    mark = f"{tmp_path}"
    run = subprocess.Popen(command, env={**os.environ, MARK: mark}, stderr=subprocess.PIPE, start_new_session=True)
    log = tmp_path / "out" / "episodes.jsonl"
    until(lambda: run.poll() is not None or lines(log) >= 4)
    assert run.poll() is None, run.stderr and run.stderr.read()
    assert workers_of(mark)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    assert run.wait(PATIENCE) == 130
    assert (tmp_path / "out" / "allocation.json").exists()
    until(lambda: not workers_of(mark))

    def go_on(folder: Path, episodes: int, resume: Path | None = None) -> str:
        steps[:] = [episodes]
        with pytest.raises(KeyboardInterrupt):
            ffgym.run(glass_config(folder, **changes), progress=Console(quiet=True), resume=resume)
        return untimed(folder / "out" / "episodes.jsonl")

    done = lines(log)
    assert go_on(tmp_path, 10, tmp_path / "out") == go_on(tmp_path / "whole", done + 10)
    assert lines(log) > done


def workers_of(mark: str) -> list[str]:
    """Workers that were started with the mark in their environment and have not ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_worker = (process / "cmdline").read_bytes().startswith(b"ray::_Worker")
            if is_worker and f"{MARK}={mark}\0".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found
