"""Workers on Ray: the same bits as one process, and what happens to those who die, hang or cannot load."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from glass_runs import glass_config, untimed
from ray_standins import Standin
from rich.console import Console

from ffgym.errors import ModelError, WorkerError
from ffgym.evaluation.evaluator import Request
from ffgym.execute.ray import Cluster, RayExecutor, Workers, connected, measuring
from ffgym.execute.shares import Speeds
from ffgym.pipeline import pipeline
from ffgym.plugins import discovery
from ffgym.prepare.parts import EvaluatorMaker

pytestmark = pytest.mark.slow
DENSE = (0, 0)


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    """One Ray for all tests of this module, as for somebody who has called ``ray.init``."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *sys.path]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address="local", num_cpus=6, object_store_memory=100_000_000, **quiet)
        yield
        ray.shutdown()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cluster(said: list[str]) -> Iterator[Cluster]:
    with connected(Workers(2), said.append) as found:
        yield found


def standin(cluster: Cluster, folder: Path, said: list[str], speeds: Speeds | None = None) -> RayExecutor:
    pool = cluster.pool(partial(measuring, Standin(folder)))
    return RayExecutor(pool, Standin(folder, is_worker=False), DENSE, speeds)


ASKED = [Request(DENSE, (0,)), *(Request((i, i), (0,)) for i in range(1, 6))]
LOSSES = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def losses(executor: RayExecutor, asked: list[Request] = ASKED) -> list[float]:
    return [evaluation.loss for evaluation in executor.measure(asked)]


def workers_of(folder: Path) -> dict[int, int]:
    """How many requests each process measured."""
    found: dict[int, int] = {}
    for line in (folder / "log").read_text().splitlines():
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


def run(folder: Path, workers: int, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(discovery.ENVIRONMENT_VARIABLE, "")
        config = glass_config(
            folder,
            agent={"name": "reinforce"},  # two updates that follow a slope, then two of PER_UPDATE episodes
            search={"episodes": 16},
            workers={"count": workers},
            output={"save_model": False, "dir": str(folder / "out")},
        )
        pipeline.run(config, progress=Console(quiet=True), **options)


def assert_same(one: Path, other: Path) -> None:
    for log in ("episodes.jsonl", "episodes-random.jsonl"):
        assert untimed(one / log) == untimed(other / log)
    for name in ("allocation.json", "losses.json", "policy.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_three_workers_find_what_one_finds(alone: Path, tmp_path: Path) -> None:
    run(tmp_path, 3)
    assert_same(alone, tmp_path / "out")


def test_a_resume_with_another_number_ends_as_if_uninterrupted(alone: Path, tmp_path: Path, steps: list[int]) -> None:
    steps[0] = 5
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 3)
    steps[0] = 10**6
    run(tmp_path, 1, resume=tmp_path / "out")
    assert_same(alone, tmp_path / "out")


def test_environments_have_workers_too(tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, "")
    alone, shared = (
        gymnasium.make_vec("ffgym/Pruning-v0", num_envs=3, num_workers=workers, **tiny_run) for workers in (1, 2)
    )
    actions = alone.action_space.sample()
    steps = []
    for envs in (alone, shared):
        envs.reset(seed=3)
        steps.append(envs.step(actions))
    assert np.array_equal(steps[0][1], steps[1][1])
    assert np.array_equal(steps[0][4]["final_info"]["loss"], steps[1][4]["final_info"]["loss"])
    shared.close()
    alone.close()


# sharing


def test_requests_are_shared_and_the_dense_model_is_measured_here(
    cluster: Cluster, tmp_path: Path, said: list[str]
) -> None:
    executor, shares = standin(cluster, tmp_path, said), list[float]()
    while not (tmp_path / "log").exists() or len(workers_of(tmp_path)) < 3:  # until both have started
        losses(executor)
    (tmp_path / "log").unlink()
    assert [e.loss for e in executor.measure(ASKED, shares.append)] == LOSSES
    measured = workers_of(tmp_path)
    assert measured.pop(os.getpid()) == 1
    assert len(measured) == 2
    assert sum(measured.values()) >= 5, "more where one helped the other"
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert losses(executor) == LOSSES
    assert set(workers_of(tmp_path)) <= {*measured, os.getpid()}, "they are kept from update to update"
    assert said == []


# faults


@pytest.mark.parametrize("fault", ["die", "die-loading", "stop"])
def test_a_worker_that_is_lost_is_replaced(cluster: Cluster, tmp_path: Path, said: list[str], fault: str) -> None:
    executor = standin(cluster, tmp_path, said, Speeds(least_patience=3.0, known={0: 0.05, 1: 0.05}))
    if fault == "stop":  # one that stands still is nothing to its helpers: both must
        losses(executor)
    (tmp_path / fault).touch()
    asked = ASKED[:2] if fault == "stop" else ASKED
    assert losses(executor, asked) == LOSSES[: len(asked)]
    assert (tmp_path / f"{fault}.claimed").exists()
    assert losses(executor) == LOSSES
    if fault != "stop":
        for _ in range(100):  # the other worker may have done its share before its loss was heard of
            if said:
                break
            losses(executor)
        assert re.fullmatch(r"worker \d ended unexpectedly \(killed, or out of memory\) .*; another .*", said[0])


def test_what_a_worker_raises_arrives_with_its_traceback(cluster: Cluster, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "raise").touch()
    with pytest.raises(ZeroDivisionError, match="a mistake") as raised:
        losses(standin(cluster, tmp_path, said))
    assert "in measure" in "\n".join(raised.value.__notes__)


def test_a_worker_that_cannot_load_says_why(cluster: Cluster, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(ModelError, match="no such model") as raised:
        losses(standin(cluster, tmp_path, said))
    assert raised.value.hint == "Name another."


def test_a_store_that_a_worker_cannot_see(tmp_path: Path) -> None:
    import torch

    nothing = torch.zeros(0, 2, dtype=torch.int64)
    maker = EvaluatorMaker(glass_config(tmp_path), nothing, nothing, (), tmp_path / "prepared" / "llama-12")
    with pytest.raises(WorkerError, match=r"does not see the prepared model .*llama-12") as raised:
        maker()
    assert "FFGYM_CACHE" in str(raised.value.hint)


def test_more_gpus_than_there_are(said: list[str]) -> None:
    with (
        pytest.raises(WorkerError, match="4 workers with 2 GPUs and 1 CPU each do not fit on machines with 0 GPUs"),
        connected(Workers(4, gpus=2), said.append),
    ):
        pass


def test_more_threads_than_any_machine_has(said: list[str]) -> None:
    with pytest.raises(WorkerError, match="2 workers with 7 CPUs each"), connected(Workers(2, threads=7), said.append):
        pass
