"""Work through a queue with workers that may be slow, hang or die.

A pool decides who does what. A crew starts workers and talks to them (`ffgym.execute.ray_crew` has that of Ray), so a
pool can be studied without a cluster. Jobs have no side effects: a job that was lost is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ffgym.errors import FFGymError, WorkerError
from ffgym.report.layout import counted
from ffgym.types import Notify, do_nothing

LISTEN_SECONDS = 0.1
PAUSE_SECONDS = 5.0  # before a worker that was lost while loading is started again
SILENT_SECONDS = 60.0  # without news while no worker works: then the user is told what they wait for
START_SECONDS = 1800.0  # that workers may take to start while no other one works
ATTEMPTS = 3  # of starting Ray, of starting a worker, and of a job
KEPT = "What was measured is kept: `--resume` continues a run, the same command a bench."


@dataclass(frozen=True)
class Ready:
    """A worker has started and waits for a job."""

    worker: int


@dataclass(frozen=True)
class Answered:
    """A worker has done its job."""

    worker: int
    answer: Any


@dataclass(frozen=True)
class Failed:
    """A worker is alive, but its job raised an error, and would again."""

    worker: int
    error: Exception


@dataclass(frozen=True)
class Lost:
    """A worker is gone, and its job with it."""

    worker: int
    why: str


News = Ready | Answered | Failed | Lost


class Crew(Protocol):
    """Workers by number, wherever they are."""

    def start(self, worker: int) -> None:
        """Begin to start a worker; `Ready`, `Failed` or `Lost` follows."""

    def give(self, worker: int, job: Any) -> None:
        """Hand a job to a worker that is ready; `Answered`, `Failed` or `Lost` follows."""

    def interrupt(self, worker: int) -> None:
        """Ask a worker to give up its job; `Answered`, `Failed` or `Lost` still follows."""

    def dismiss(self, worker: int) -> None:
        """Kill a worker; nothing follows."""

    def hear(self, seconds: float) -> list[News]:
        """What has happened: returns as soon as something has, or after this time."""

    def share(self, worker: int) -> float:
        """How much of its job a worker has done, from 0 to 1, as far as is known."""

    def shortage(self) -> str:
        """What the workers that are starting wait for; empty where one of them is being loaded."""


class Queue(Protocol):
    """Hands out jobs."""

    def take(self, worker: int, alive: Set[int]) -> Any | None:
        """The next job for a worker that is ready; ``None`` where there is none for it now.

        Args:
            alive: all workers that there are, busy ones and those that are starting included.
        """

    def done(self, worker: int, answer: Any) -> None:
        """Record the answer to a worker's job."""

    def failed(self, worker: int, error: Exception) -> bool:
        """Whether the others go on where a worker's job has raised an error; else it is raised here."""

    def lost(self, worker: int) -> None:
        """A worker's job has to be done again."""

    def patience(self, worker: int) -> float | None:
        """Seconds without any progress after which a worker's job counts as hung; ``None`` for no limit."""

    @property
    def is_finished(self) -> bool:
        """Whether all jobs are done."""


@dataclass
class _Busy:
    """A job that is being done."""

    queue: Queue
    share: float = 0.0
    moved: float = field(default_factory=time.monotonic)


class Pool:
    """Workers that are started when there is work for them, and replaced when they are lost.

    Args:
        size: how many there may be, >= 1.
        grace: seconds that an interrupted worker may take to end its job.
    """

    def __init__(self, crew: Crew, size: int, notify: Notify, grace: float = 0.0) -> None:
        self.size = size
        self._crew = crew
        self._notify = notify
        self._grace = grace
        self._starting: set[int] = set()
        self._paused: dict[int, float] = {}  # until when
        self._ready: set[int] = set()
        self._busy: dict[int, _Busy] = {}
        self._attempts = dict.fromkeys(range(size), 0)
        self._heard = self._asked = time.monotonic()
        self._has_run = False
        self._is_explained = False
        self._is_closed = False

    def work(self, queue: Queue, wanted: int, on_tick: Callable[[], None] = do_nothing) -> None:
        """Do every job of a queue.

        Args:
            wanted: for how many workers it has work.
            on_tick: called several times a second.

        Raises:
            Exception: what a job raised, unless the queue goes on without it.
            WorkerError: workers or a job are lost again and again; or the pool is closed.
        """
        if self._is_closed:
            raise WorkerError("this environment is closed, and its workers have ended", hint="Make it again.")
        self._heard = time.monotonic()
        self._is_explained = False
        there = self._starting | self._ready | self._busy.keys() | self._paused.keys()
        if missing := [worker for worker in range(min(wanted, self.size)) if worker not in there]:
            self._notify(f"loading the model in {counted(len(missing), 'worker')}")
            self._paused |= dict.fromkeys(missing, 0.0)
        while not queue.is_finished:
            for worker in [each for each, until in self._paused.items() if until <= time.monotonic()]:
                del self._paused[worker]
                self._starting.add(worker)
                self._crew.start(worker)
            for worker in sorted(self._ready):
                if (job := queue.take(worker, self._starting | self._ready | self._busy.keys())) is not None:
                    self._ready.remove(worker)
                    self._busy[worker] = _Busy(queue)
                    self._crew.give(worker, job)
            for news in self._crew.hear(LISTEN_SECONDS):
                self._heard = time.monotonic()
                self._take_note(news, queue)
            self._look_for_hung()
            on_tick()
        for worker in self._busy:
            self._crew.interrupt(worker)

    def share(self, worker: int) -> float:
        """How much of its job a busy worker has done."""
        return self._busy[worker].share if worker in self._busy else 0.0

    def close(self) -> None:
        """Interrupt the busy workers, wait for them, and dismiss all."""
        self._is_closed = True
        until = time.monotonic() + self._grace
        for worker in self._busy:
            self._crew.interrupt(worker)
        with suppress(WorkerError):  # of a cluster that is gone nobody is heard
            while self._busy and time.monotonic() < until:
                for news in self._crew.hear(1.0):
                    self._busy.pop(news.worker, None)
        for worker in range(self.size):
            self._crew.dismiss(worker)
        self._starting, self._paused, self._ready, self._busy = set(), {}, set(), {}

    def _take_note(self, news: News, queue: Queue) -> None:
        worker = news.worker
        match news:
            case Ready():
                self._starting.discard(worker)
                self._ready.add(worker)
                self._attempts[worker] = 0
                self._has_run = True
            case Answered(answer=answer):
                job = self._busy.pop(worker)
                self._ready.add(worker)
                if job.queue is queue:
                    queue.done(worker, answer)
            case Failed(error=error):
                job_of = self._busy.pop(worker, None)
                self._starting.discard(worker)
                # Of another queue: nobody waits for it any more.
                if job_of is None or (job_of.queue is queue and not queue.failed(worker, error)):
                    self._crew.dismiss(worker)
                    raise error
                self._ready.add(worker)
            case Lost(why=why):
                self._replace(worker, why)

    def _replace(self, worker: int, why: str) -> None:
        """Start another worker in the place of one that is lost, and have its job done again."""
        was_starting = worker in self._starting
        self._starting.discard(worker)
        self._ready.discard(worker)
        job = self._busy.pop(worker, None)
        self._crew.dismiss(worker)
        self._attempts[worker] += was_starting
        if self._attempts[worker] >= ATTEMPTS:
            raise WorkerError(f"worker {worker + 1} {why}, {ATTEMPTS} times in a row while it was loading", hint=KEPT)
        doing = "while it was loading" if was_starting else "and its work is done again" if job else "while it was idle"
        self._notify(f"worker {worker + 1} {why} {doing}; another one takes its place")
        if job is not None:
            job.queue.lost(worker)
        # Ray may not have noticed yet that the machine is gone.
        self._paused[worker] = time.monotonic() + PAUSE_SECONDS * self._attempts[worker]

    def _look_for_hung(self) -> None:
        now = time.monotonic()
        for worker, job in list(self._busy.items()):
            if (share := self._crew.share(worker)) != job.share:
                job.share, job.moved = share, now
            patience = job.queue.patience(worker)
            if patience is not None and now - job.moved > patience:
                self._replace(worker, f"did nothing for {now - job.moved:,.0f} s")
        if self._busy or self._ready:
            return
        if now - self._heard > START_SECONDS:
            raise WorkerError(
                f"no worker has started within {START_SECONDS:,.0f} s", hint=f"Is the cluster full? {KEPT}"
            )
        if now - max(self._heard, self._asked) > SILENT_SECONDS and not self._is_explained:
            self._asked = now
            if shortage := self._crew.shortage():
                self._is_explained = True
                state = "is running" if self._has_run else "has started yet"
                self._notify(f"no worker {state}: {shortage}; waiting for {START_SECONDS / 60:.0f} min at most")


def too_often(what: str) -> FFGymError:
    """The error for a job that no worker survives."""
    return WorkerError(f"{ATTEMPTS} workers were lost on {what}", hint=f"If memory is short, use fewer workers. {KEPT}")
