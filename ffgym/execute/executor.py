"""An update's measurements, shared out among a pool of workers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ffgym.evaluation.evaluator import Evaluator, Request
from ffgym.execute.pool import Pool
from ffgym.execute.shares import Shares, Speeds, cost, joined, parts
from ffgym.report.progress import Reporter
from ffgym.types import Evaluation, OnShare, do_nothing


@dataclass
class PoolExecutor:
    """An evaluator that shares requests out among workers; how many there are changes no bit of what comes back.

    Meanwhile, this process measures the dense model and keeps its results by window. Shared out, every worker would end
    up measuring every window.
    """

    pool: Pool  # workers that each measure a list of requests
    dense: Evaluator  # measures the dense model here
    dense_units: tuple[int, ...]  # of each sublayer
    speeds: Speeds = field(default_factory=Speeds)

    def measure(self, requests: Sequence[Request], on_progress: OnShare = do_nothing) -> list[Evaluation]:
        """Measure every request, in the order asked for."""
        dense = [request for request in requests if request.kept == self.dense_units]
        shared = {request: parts(request) for request in requests if request.kept != self.dense_units}
        others = list(dict.fromkeys(chain.from_iterable(shared.values())))
        if not others:
            return self.dense.measure(requests, on_progress)
        with _in_background(lambda stop: self.dense.measure(dense, stop)) as measured:
            shares = Shares(others, self.speeds)
            self.pool.work(shares, len(others), lambda: self._tell(shares, on_progress))
            shares.note_late(self.pool.share)
            found = dict(zip(dense, measured(), strict=True))
        found |= {request: joined([shares.answers[part] for part in own]) for request, own in shared.items()}
        return [found[request] for request in requests]

    def _tell(self, shares: Shares, on_progress: OnShare) -> None:
        running = sum(share.cost * self.pool.share(worker) for worker, share in shares.taken.items())
        done = min(1.0, (sum(map(cost, shares.answers)) + running) / shares.total)
        if done or not shares.taken:  # 0 says that nobody measures yet
            on_progress(done)


@contextlib.contextmanager
def _in_background(call: Callable[[OnShare], Any]) -> Iterator[Callable[[], Any]]:
    """Make a call in a thread that ends with the block; the call reports progress, and is stopped by that."""
    is_over = threading.Event()

    def stop_if_over(share: float) -> None:
        if is_over.is_set():
            raise InterruptedError

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, stop_if_over)
        try:
            yield future.result
        finally:
            is_over.set()


def measuring(make_evaluator: Callable[[], Evaluator], reporter: Reporter) -> Callable[[Any, OnShare], Any]:
    """What a worker that measures requests does; the first argument bound, it is a `ffgym.execute.ray_crew.Make`."""
    return make_evaluator().measure
