"""Who measures what, and what happens to those who are late, hang or die: with workers that only sleep."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from ffgym.errors import WorkerError
from ffgym.evaluation.evaluator import Request
from ffgym.execute.pool import Failed, Lost, News, Pool
from ffgym.execute.ray_crew import RayCrew
from ffgym.execute.shares import Shares, Speeds
from ffgym.types import Evaluation

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "scale"))
from sleeping import SleepingCrew

MOMENT = 0.02


@pytest.fixture
def put_forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``put_forward(seconds)`` moves the clock: nobody waits for what has to be late."""
    now, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(ahead))
    return ahead.append


def requests(count: int, windows: int = 1) -> list[Request]:
    return [Request((i,), tuple(range(windows))) for i in range(count)]


def ray_crew(ray: MagicMock, cpus: int = 0) -> RayCrew:
    ray.exceptions.RayError = type("RayError", (Exception,), {})
    return RayCrew(ray, lambda reporter: lambda job, report: job, {"num_cpus": cpus, "num_gpus": 0}, 1, print)


def update(
    crew: SleepingCrew, size: int, asked: list[Request], speeds: Speeds | None = None, said: list[str] | None = None
) -> Shares:
    shares = Shares(asked, speeds or Speeds())
    pool = Pool(crew, size, (said if said is not None else []).append)
    pool.work(shares, len(asked))
    return shares


def taken(crew: SleepingCrew) -> dict[int, list[int]]:
    """How many requests every worker was given at a time."""
    found: dict[int, list[int]] = {}
    for worker, job in crew.given:
        found.setdefault(worker, []).append(len(job))
    return found


@pytest.mark.parametrize(("size", "counts"), [(1, [9]), (2, [5, 4]), (3, [3, 3, 3]), (4, [2, 3, 2, 2])])
def test_equal_workers_take_equal_shares_once(size: int, counts: list[int]) -> None:
    crew, asked = SleepingCrew(lambda worker: MOMENT), requests(9)
    speeds = Speeds(known=dict.fromkeys(range(size), 60.0))
    shares = update(crew, size, asked, speeds)
    assert sorted(n for each in taken(crew).values() for n in each) == sorted(counts)
    assert {request: answer.loss for request, answer in shares.answers.items()} == {r: r.kept[0] for r in asked}


def test_a_worker_three_times_as_slow_takes_a_third() -> None:
    shares, alive = Shares(requests(8), Speeds(known={0: 1.0, 1: 3.0})), {0, 1}
    assert [len(shares.take(worker, alive) or []) for worker in (0, 1)] == [6, 2]


def test_what_workers_took_is_known_in_the_next_update() -> None:
    speeds, alive = Speeds(), {0, 1}
    shares = Shares(requests(8), speeds)
    jobs = [shares.take(worker, alive) or [] for worker in (0, 1)]
    for worker, job in enumerate(jobs):  # the second ends later
        time.sleep(MOMENT)
        shares.done(worker, [Evaluation((0.0,), 1)] * len(job))
    assert MOMENT <= 4 * speeds.known[0] < 4 * speeds.known[1]


def test_slopes_and_windows_weigh() -> None:
    heavy = Request((1,), (0, 1, 2, 3), needs=frozenset({"slopes"}))
    crew = SleepingCrew(lambda worker: 0.0)
    update(crew, 2, [heavy, *requests(8)])
    assert crew.given[0][1] == [heavy]


def test_those_who_are_idle_measure_what_is_late_and_the_first_answer_counts() -> None:
    crew = SleepingCrew(lambda worker: 60.0 if worker == 1 else MOMENT)
    shares = update(crew, 3, requests(6))
    assert len(shares.answers) == 6


def test_a_worker_that_dies_is_replaced_and_its_work_is_done_again() -> None:
    crew = SleepingCrew(lambda worker: MOMENT, dies=lambda worker, job: (worker, job) == (0, 1))
    said: list[str] = []
    shares = update(crew, 2, requests(4), Speeds(known={0: 60.0, 1: 60.0}), said)  # none is late, so none is helped
    assert len(shares.answers) == 4
    assert crew.started == [0, 1, 0]
    assert said == [
        "loading the model in 2 workers",
        "worker 1 died and its work is done again; another one takes its place",
    ]


def test_a_worker_that_hangs_is_replaced(put_forward: Callable[[float], None]) -> None:
    class Hanging(SleepingCrew):
        def give(self, worker: int, job: Any) -> None:
            super().give(worker, job)
            if self.started == [0]:
                put_forward(600.0)

    crew = Hanging(lambda worker: 60.0 if crew.started == [0] else 0.0)
    speeds, said = Speeds(known={0: 0.001}), list[str]()
    assert len(update(crew, 1, requests(2), speeds, said).answers) == 2
    assert re.match(r"worker 1 did nothing for [\d,]+ s and its work is done again", said[1])


def test_work_that_no_worker_survives_stops() -> None:
    crew = SleepingCrew(lambda worker: 0.0, dies=lambda worker, job: job > 0)
    with pytest.raises(WorkerError, match="3 workers were lost on the same measurement") as raised:
        update(crew, 1, requests(2))
    assert "`--resume` continues a run" in str(raised.value.hint)


def test_a_late_worker_may_die_once_others_have_answered() -> None:
    asked, alive = requests(1), {0, 1, 2, 3}
    shares = Shares(asked, Speeds(known={9: 1e-9}))
    for worker in (0, 1):
        shares.take(worker, alive)
        shares.lost(worker)
    assert [shares.take(worker, alive) for worker in (2, 3)] == [asked, asked], "the first of them is late"
    shares.done(3, [Evaluation((0.0,), 1)])
    shares.lost(2)
    assert shares.is_finished


def test_hearing_of_nobody_takes_the_time_that_it_may() -> None:
    crew = ray_crew(MagicMock())
    start = time.monotonic()
    assert crew.hear(MOMENT) == []
    assert time.monotonic() - start >= MOMENT


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_lost_connection_is_one_error_and_ray_joins_no_other_cluster(is_noticed: bool) -> None:
    """Every call of a Ray that is not initialised would start or join one; its client may not have noticed yet."""
    ray = MagicMock()
    crew = ray_crew(ray, cpus=1)
    crew.start(0)
    crew.give(0, "job")
    ray.reset_mock()
    if is_noticed:
        ray.is_initialized.return_value = False
    else:
        ray.wait.side_effect = ConnectionError("Failed during this or a previous request.")
    for call in (partial(crew.hear, MOMENT), crew.shortage):
        with pytest.raises(WorkerError, match="the connection to the Ray cluster is lost") as raised:
            call()
        assert "`--resume` continues a run" in str(raised.value.hint)
    crew.interrupt(0)
    if is_noticed:
        assert {str(call) for call in ray.mock_calls} == {"call.is_initialized()"}


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_worker_is_lost_with_the_connection_where_rays_node_of_this_machine_has_ended(is_alive: bool) -> None:
    ray = MagicMock()
    ray.util.client.ray.is_connected.return_value = False
    ray.get_runtime_context.return_value.get_node_id.return_value = "here"
    ray.nodes.return_value = [{"NodeID": "here", "Alive": is_alive}, {"NodeID": "there", "Alive": True}]
    ray.wait.side_effect = lambda calls, **options: (calls, [])
    crew = ray_crew(ray)
    ray.get.side_effect = ray.exceptions.RayError("The actor died unexpectedly.")
    crew.start(0)
    if is_alive:
        assert crew.shortage() == ""
        assert crew.hear(MOMENT) == [Lost(0, "ended unexpectedly (killed, or out of memory)")]
        return
    for call in (crew.shortage, partial(crew.hear, MOMENT)):  # no news may come of a worker that never starts
        with pytest.raises(WorkerError, match="the connection to the Ray cluster is lost") as raised:
            call()
        assert "`--resume` continues a run" in str(raised.value.hint)


def test_ray_is_asked_nothing_once_ending_a_worker_has_shown_that_the_connection_is_lost() -> None:
    def lose(*args: Any, **options: Any) -> None:
        ray.is_initialized.return_value = False
        raise ConnectionError("Failed during this or a previous request.")

    ray = MagicMock()
    ray.kill.side_effect = lose
    crew = ray_crew(ray)
    crew.start(0)
    crew.dismiss(0)
    assert str(ray.mock_calls[-1]).startswith("call.kill(")


def test_loading_that_no_worker_survives_stops(put_forward: Callable[[float], None]) -> None:
    class Hopeless(SleepingCrew):
        def hear(self, seconds: float) -> list[News]:
            put_forward(10.0)
            return super().hear(seconds)

    crew = Hopeless(lambda worker: 0.0, dies=lambda worker, job: job == 0)
    with pytest.raises(WorkerError, match="worker 1 died, 3 times in a row while it was loading"):
        update(crew, 1, requests(2))


class Late(SleepingCrew):
    """Workers that take a minute and a half, by the clock, when they start for this time."""

    def __init__(self, put_forward: Callable[[float], None], time: int, why: str, **options: Any) -> None:
        super().__init__(lambda worker: 0.0, loading=0.5, **options)
        self._put_forward, self._late, self._why = put_forward, time, why

    def shortage(self) -> str:
        return self._why

    def hear(self, seconds: float) -> list[News]:
        if len(self.started) == self._late:
            self._late = 0
            self._put_forward(90.0)
        return super().hear(seconds)


@pytest.mark.parametrize("shortage", ["the cluster is full", ""])
def test_what_workers_wait_for_is_told_once(shortage: str, put_forward: Callable[[float], None]) -> None:
    said: list[str] = []
    update(Late(put_forward, 2, shortage), 2, requests(2), said=said)
    why = ["no worker has started yet: the cluster is full; waiting for 30 min at most"] if shortage else []
    assert said == ["loading the model in 2 workers", *why]


def test_what_workers_wait_for_is_asked_again_until_there_is_an_answer(put_forward: Callable[[float], None]) -> None:
    class Undecided(SleepingCrew):
        def shortage(self) -> str:
            return answers.pop(0)

        def hear(self, seconds: float) -> list[News]:
            if not answers:
                return super().hear(seconds)
            put_forward(90.0)
            return []

    answers, said = ["", "the cluster is full"], list[str]()
    update(Undecided(lambda worker: 0.0), 2, requests(2), said=said)
    assert said[1:] == ["no worker has started yet: the cluster is full; waiting for 30 min at most"]


def test_workers_that_have_run_are_not_said_to_start_for_the_first_time(put_forward: Callable[[float], None]) -> None:
    why, said = "the cluster has no machine left", list[str]()
    pool = Pool(Late(put_forward, 2, why, dies=lambda worker, job: job == 2), 1, said.append)
    pool.work(Shares(requests(1), Speeds()), 1)
    pool.work(Shares(requests(1), Speeds()), 1)
    assert said[2:] == [f"no worker is running: {why}; waiting for 30 min at most"]


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_cluster_without_a_machine_is_told_from_a_full_one(is_alive: bool) -> None:
    ray = MagicMock()
    ray.wait.return_value = [], []
    ray.nodes.return_value = [{"Alive": is_alive}]
    ray.available_resources.return_value = {}
    crew = ray_crew(ray, cpus=1)
    crew.start(0)
    full = "each needs 1 CPU, and the cluster has 0 CPUs free"
    assert crew.shortage() == (full if is_alive else "the cluster has no machine left")


def test_what_a_job_raises_ends_the_work() -> None:
    class Broken(SleepingCrew):
        def give(self, worker: int, job: Any) -> None:
            self._later(worker, 0.0, lambda: Failed(worker, ZeroDivisionError("a mistake")))

    with pytest.raises(ZeroDivisionError, match="a mistake"):
        update(Broken(lambda worker: 0.0), 2, requests(3))


def test_no_more_workers_start_than_there_is_work_for() -> None:
    crew = SleepingCrew(lambda worker: 0.0)
    update(crew, 5, requests(2))
    assert crew.started == [0, 1]


def test_closing_interrupts_and_dismisses() -> None:
    crew = SleepingCrew(lambda worker: 60.0)
    pool = Pool(crew, 2, print)
    with pytest.raises(KeyboardInterrupt):
        pool.work(Shares(requests(2), Speeds()), 2, _interrupt_when(lambda: len(crew.given) == 2))
    pool.close()
    assert all(crew._enough[worker].is_set() for worker in range(2))
    with pytest.raises(WorkerError, match="this environment is closed, and its workers have ended"):
        pool.work(Shares(requests(2), Speeds()), 2)


def test_closing_waits_for_nobody_whose_cluster_is_gone() -> None:
    class Gone(SleepingCrew):
        def hear(self, seconds: float) -> list[News]:
            if self.given:
                raise WorkerError("the connection is lost")
            return super().hear(seconds)

    crew = Gone(lambda worker: 60.0)
    pool = Pool(crew, 1, print, grace=600.0)
    with pytest.raises(WorkerError, match="the connection is lost"):
        pool.work(Shares(requests(1), Speeds()), 1)
    pool.close()
    assert crew._enough[0].is_set()


def _interrupt_when(happened: Callable[[], bool]) -> Callable[[], None]:
    def on_tick() -> None:
        if happened():
            raise KeyboardInterrupt

    return on_tick
