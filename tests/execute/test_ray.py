"""Workers on Ray: the same bits as one process, and what happens to those who die, hang or cannot load."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from glass_runs import glass_config, untimed
from processes import until
from ray_standins import Standin, Told, patiently
from rich.console import Console

import ffgym
from ffgym.errors import ModelError, WorkerError
from ffgym.evaluation.evaluator import Request
from ffgym.execute.executor import PoolExecutor, measuring
from ffgym.execute.ray import Cluster, Workers, connected
from ffgym.plugins import discovery
from ffgym.prepare.workers import EvaluatorMaker

pytestmark = pytest.mark.slow
DENSE = (0, 0)
TOLD = {"HF_TOKEN": "hf_not_for_logs", "MLFLOW_TRACKING_URI": "https://me:not_for_logs@here"}
OF_THE_CLUSTER, NOT_TOLD = "MLFLOW_TRACKING_USERNAME", "AWS_SECRET_ACCESS_KEY"


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    """One Ray for all tests of this module, as for somebody who has called ``ray.init``."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *sys.path]))
        patch.setenv(OF_THE_CLUSTER, "its own")
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        patiently(lambda: ray.init(address="local", num_cpus=6, object_store_memory=100_000_000, **quiet))
        patch.delenv(OF_THE_CLUSTER)
        yield
        ray.shutdown()


class Standins(PoolExecutor):
    """Two workers, which take seconds to start and so are shared; what they are asked to do is in their folder."""

    def __init__(self, cluster: Cluster, folder: Path, said: list[str]) -> None:
        make = Told(folder, names=("HF_HOME", *TOLD, OF_THE_CLUSTER, NOT_TOLD))
        super().__init__(cluster.pool(partial(measuring, make)), Standin(folder, is_worker=False), DENSE)
        self.folder, self.said, self.processes = folder, said, set[int]()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standins]:
    said, folder = list[str](), tmp_path_factory.mktemp("shared")
    with connected(Workers(2), said.append) as cluster:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**TOLD, "HF_HOME": str(folder), NOT_TOLD: "whose?"}.items():
                patch.setenv(name, value)
            executor = Standins(cluster, folder, said)
            losses(executor)
        yield executor


@pytest.fixture
def executor(shared: Standins) -> Standins:
    """Both workers and this process measure; nothing is in their log, and nothing was said."""
    log = shared.folder / "log"
    log.unlink(missing_ok=True)
    until(lambda: losses(shared) and len(workers_of(shared.folder)) == 3)
    shared.processes = set(workers_of(shared.folder))
    log.unlink()
    shared.said.clear()
    return shared


ASKED = [Request(DENSE, (0,)), *(Request((i, i), (0,)) for i in range(1, 6))]
LOSSES = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def losses(executor: PoolExecutor, asked: list[Request] = ASKED) -> list[float]:
    return [evaluation.loss for evaluation in executor.measure(asked)]


def workers_of(folder: Path) -> dict[int, int]:
    """How many requests each process measured."""
    found: dict[int, int] = {}
    log = folder / "log"
    for line in log.read_text().splitlines() if log.exists() else ():
        process, count, threads = map(int, line.split())
        found[process] = found.get(process, 0) + count
        assert threads == 1
    return found


# bits


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1)
    return folder / "out"


def run(folder: Path, workers: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(discovery.ENVIRONMENT_VARIABLE, "")
        config = glass_config(
            folder,
            agent={"name": "reinforce"},  # two updates that follow a slope, then two of PER_UPDATE episodes
            search={"episodes": 16},
            workers={"count": workers},
            output={"save_model": False, "dir": str(folder / "out")},
        )
        ffgym.run(config, progress=Console(quiet=True))


def assert_same(one: Path, other: Path) -> None:
    for log in ("episodes.jsonl", "episodes-random.jsonl"):
        assert untimed(one / log) == untimed(other / log)
    for name in ("allocation.json", "losses.json", "policy.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_two_workers_find_what_one_finds(alone: Path, tmp_path: Path) -> None:
    run(tmp_path, 2)
    assert_same(alone, tmp_path / "out")


# sharing


def test_requests_are_shared_and_the_dense_model_is_measured_here(executor: Standins) -> None:
    shares: list[float] = []
    assert [e.loss for e in executor.measure(ASKED, shares.append)] == LOSSES
    measured = workers_of(executor.folder)
    assert measured.pop(os.getpid()) == 1
    assert sum(measured.values()) >= 5, "more where one helped the other"
    assert shares == sorted(shares)
    assert 0.0 not in shares, "it is told only while nobody measures"
    assert shares[-1] == 1.0
    assert losses(executor) == LOSSES
    assert set(workers_of(executor.folder)) <= executor.processes, "they are kept from update to update"
    assert executor.said == []


def test_who_waits_for_a_full_cluster_is_told(
    executor: Standins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def say(line: str) -> None:
        said.append(line)
        if "CPU" in line:
            raise KeyboardInterrupt  # no worker need start

    said: list[str] = []
    monkeypatch.setattr("ffgym.execute.pool.SILENT_SECONDS", 0.0)
    others = ray.util.placement_group([{"CPU": 4}])  # what the workers of this module leave
    assert others.wait()
    with connected(Workers(2), say) as cluster, pytest.raises(KeyboardInterrupt):
        losses(cluster.executor(Standin(tmp_path), Standin(tmp_path, is_worker=False), DENSE))
    assert said[-1] == (
        "no worker has started yet: each needs 1 CPU, and the cluster has 0 CPUs free; waiting for 30 min at most"
    )
    ray.util.remove_placement_group(others)


# faults


def test_a_worker_that_stands_still_is_replaced(executor: Standins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffgym.execute.shares.LEAST_PATIENCE", 10.0)
    (executor.folder / "stop").touch()
    until(lambda: losses(executor) == LOSSES and executor.said)  # meanwhile the other one does all
    assert (executor.folder / "stop.claimed").exists()
    assert re.match(r"worker \d did nothing for \d+ s", executor.said[0])


def test_a_worker_that_dies_at_work_or_while_loading_is_replaced(executor: Standins) -> None:
    (executor.folder / "die-loading").touch()
    (executor.folder / "die").touch()
    # The other worker may have done its share before its loss is heard of.
    until(lambda: losses(executor) == LOSSES and len(executor.said) > 1)
    assert (executor.folder / "die.claimed").exists()
    assert (executor.folder / "die-loading.claimed").exists()
    lost = r"worker \d ended unexpectedly \(killed, or out of memory\) .*; another .*"
    assert all(re.fullmatch(lost, line) for line in executor.said)


def test_what_a_worker_raises_arrives_with_its_traceback_and_why_none_loads(executor: Standins) -> None:
    (executor.folder / "raise").touch()
    with pytest.raises(ZeroDivisionError, match="a mistake") as raised:
        losses(executor)
    assert "in measure" in "\n".join(raised.value.__notes__)
    (executor.folder / "broken").touch()  # for the one that takes its place
    assert f"in a worker on {socket.gethostname()}" in raised.value.__notes__[-1]
    with pytest.raises(ModelError, match=f"^a worker on {socket.gethostname()}: no such model") as refused:
        until(lambda: losses(executor) != LOSSES)
    assert refused.value.hint == "Name another."


def test_a_package_that_a_workers_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "only_here", ModuleType("only_here"))
    maker = type("Maker", (), {"__module__": "only_here"})
    sys.modules["only_here"].Maker = maker  # type: ignore[attr-defined]
    with connected(Workers(2), print) as cluster:
        executor = cluster.executor(maker(), Standin(tmp_path, is_worker=False), DENSE)
        with pytest.raises(WorkerError, match=r"a worker cannot begin on [\d.]+: .*No module named 'only_here'"):
            losses(executor)


def test_workers_are_told_what_this_process_is_told(shared: Standins) -> None:
    from ray._private.worker import _global_node

    known, folder = json.loads((shared.folder / "told.json").read_text()), str(shared.folder)
    assert known.pop("imported with") == folder
    assert known == {**TOLD, "HF_HOME": folder, OF_THE_CLUSTER: None, NOT_TOLD: None}
    logs = [path for path in Path(_global_node.get_logs_dir_path()).rglob("*") if path.is_file()]
    assert logs
    assert not any("not_for_logs" in path.read_text(errors="replace") for path in logs)


def test_a_model_that_a_worker_cannot_see(tmp_path: Path) -> None:
    import torch

    nothing, place = torch.zeros(0, 2, dtype=torch.int64), str(tmp_path / "moved")
    maker = EvaluatorMaker(glass_config(tmp_path), nothing, nothing, (), frozenset(), None, "llama-12", place=place)
    with pytest.raises(WorkerError, match=f"a worker on {socket.gethostname()} does not see {place}") as raised:
        maker()
    assert "disk that all machines share" in str(raised.value.hint)


def test_a_store_that_a_worker_cannot_see(tmp_path: Path) -> None:
    import torch

    nothing = torch.zeros(0, 2, dtype=torch.int64)
    maker = EvaluatorMaker(
        glass_config(tmp_path), nothing, nothing, (), frozenset(), tmp_path / "prepared" / "llama-12", "llama-12"
    )
    with pytest.raises(WorkerError, match=r"does not see the prepared model .*llama-12") as raised:
        maker()
    assert "FFGYM_CACHE" in str(raised.value.hint)


def test_more_gpus_than_there_are() -> None:
    with (
        pytest.raises(WorkerError, match="4 workers with 2 GPUs and 1 CPU each do not fit on machines with 0 GPUs"),
        connected(Workers(4, gpus=2), print),
    ):
        pass


def test_more_threads_than_any_machine_has() -> None:
    with pytest.raises(WorkerError, match="2 workers with 7 CPUs each"), connected(Workers(2, threads=7), print):
        pass
