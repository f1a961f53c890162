"""Workers that sleep instead of measuring: what is left is the pool's own doing."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ffgym.execute.pool import Answered, Lost, News, Ready
from ffgym.types import Evaluation


class SleepingCrew:
    """A thread for every job, see `ffgym.execute.pool.Crew`.

    Args:
        seconds: how long a worker takes for one request.
        loading: seconds that a worker takes to start.
        dies: whether a worker dies in a job, asked with its number and that of the job, from 1; 0 is loading.
    """

    def __init__(
        self,
        seconds: Callable[[int], float],
        loading: float = 0.0,
        dies: Callable[[int, int], bool] = lambda worker, job: False,
    ) -> None:
        self.given: list[tuple[int, Any]] = []
        self.started: list[int] = []
        self._seconds, self._loading, self._dies = seconds, loading, dies
        self._news: queue.Queue[tuple[int, News]] = queue.Queue()
        self._lives: dict[int, int] = {}
        self._jobs: dict[int, int] = {}
        self._enough: dict[int, threading.Event] = {}
        self._shares: dict[int, float] = {}

    def start(self, worker: int) -> None:
        self.started.append(worker)
        self._lives[worker] = self._lives.get(worker, 0) + 1
        news = Lost(worker, "died") if self._dies(worker, 0) else Ready(worker)
        self._later(worker, self._loading, lambda: news)

    def give(self, worker: int, job: Any) -> None:
        self.given.append((worker, job))
        self._jobs[worker] = number = self._jobs.get(worker, 0) + 1
        self._enough[worker], self._shares[worker] = threading.Event(), 0.0
        if self._dies(worker, number):
            self._later(worker, self._seconds(worker) / 2, lambda: Lost(worker, "died"))
            return

        def work() -> News:
            for place in range(len(job)):
                if self._enough[worker].wait(self._seconds(worker)):
                    return Answered(worker, None)
                self._shares[worker] = (place + 1) / len(job)
            return Answered(worker, [Evaluation((float(sum(request.kept)),), 1) for request in job])

        self._later(worker, 0.0, work)

    def interrupt(self, worker: int) -> None:
        self._enough[worker].set()

    def dismiss(self, worker: int) -> None:
        self._lives[worker] = self._lives.get(worker, 0) + 1  # what it still says is not heard

    def share(self, worker: int) -> float:
        return self._shares.get(worker, 0.0)

    def shortage(self) -> str:
        return ""

    def hear(self, seconds: float) -> list[News]:
        heard: list[tuple[int, News]] = []
        until = time.monotonic() + seconds
        while not heard and (left := until - time.monotonic()) > 0:
            try:
                heard.append(self._news.get(timeout=left))
                while True:
                    heard.append(self._news.get_nowait())
            except queue.Empty:
                pass
        return [news for life, news in heard if life == self._lives[news.worker]]

    def _later(self, worker: int, seconds: float, make: Callable[[], News]) -> None:
        life = self._lives[worker]

        def run() -> None:
            time.sleep(seconds)
            self._news.put((life, make()))

        threading.Thread(target=run, daemon=True).start()
