"""The order in which cells are computed, and how long they will take."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ffgym.bench.cell import Cell, CellRunner, Job
from ffgym.errors import (
    AssetError,
    DataError,
    FFGymError,
    FitError,
    ModelError,
    OutputError,
    TrackingError,
    WorkerError,
)
from ffgym.execute.pool import ATTEMPTS, too_often
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.prepare.configured import used_plugins
from ffgym.prepare.workers import foreign_plugins, local_places
from ffgym.report.progress import Reporter, clock
from ffgym.search.finals import expected_tokens

if TYPE_CHECKING:
    from ffgym.execute.ray import Cluster

SECONDS_TO_END = 30.0  # that an interrupted cell gets to end
GOES_ON = "Finished cells are kept, and the same command goes on."
SHARED = (AssetError, ModelError, OutputError, TrackingError, WorkerError)
"""Errors of the model and the machine, which all cells share."""

PREPARING = (DataError, FitError)
"""Errors of text and memory, which cells share that prepare the model alike."""


class Failure(NamedTuple):
    """A cell that failed, in words: the error itself would keep the model in memory."""

    cell: str
    error: str
    traceback: str


def compute(
    missing: Sequence[Cell],
    cells: Sequence[Cell],
    parents: Mapping[Path, str | None],
    reporter: Reporter,
    cluster: Cluster | None,
) -> list[Failure]:
    """Compute cells, one seed of everything first; cells that share a prepared model follow one another.

    The arguments are those of `CellQueue`. Without a cluster this process computes alone.

    Returns:
        what failed.

    Raises:
        FFGymError: what would make all other cells fail, too.
    """
    queue = CellQueue(missing, cells, parents, reporter)
    if cluster is not None:
        cluster.pool(in_worker, reporter.print, SECONDS_TO_END).work(queue, len(missing))
        return queue.failures
    runner = CellRunner(reporter)
    while (job := queue.take(0)) is not None:
        try:
            runner(job)
        except FFGymError as error:
            if not queue.failed(0, error):
                raise
        else:
            queue.done(0)
    return queue.failures


def in_worker(reporter: Reporter) -> Callable[[Job, Any], None]:
    """What a worker does: one cell after another."""
    runner = CellRunner(reporter)
    return lambda job, advance: runner(job)


class CellQueue:
    """Hands out cells: first seeds first, and within them what the worker has the prepared model for.

    Args:
        missing: to be computed.
        cells: all of the benches, finished ones too: a bench that goes on shall find the model that it has prepared.
        parents: the MLflow runs of the bench files.
    """

    def __init__(
        self, missing: Sequence[Cell], cells: Sequence[Cell], parents: Mapping[Path, str | None], reporter: Reporter
    ) -> None:
        self._waiting = list(missing)
        self._cells = cells
        self._parents = parents
        self._reporter = reporter
        self._prepared: dict[int, str] = {}  # the preparation that each worker holds
        self._count, self._begun = len(missing), 0.0
        self._running: dict[int, Cell] = {}
        self._losses: Counter[str] = Counter()
        self._done, self._total = 0, sum(map(_tokens, missing))
        is_alike = len({cell.preparation for cell in missing}) == 1
        self._stopping = SHARED + PREPARING if is_alike else SHARED
        self.failures: list[Failure] = []

    @property
    def is_finished(self) -> bool:
        """Whether every cell is computed, or left to another bench."""
        return not self._waiting and not self._running

    def take(self, worker: int, alive: Set[int] = frozenset()) -> Job | None:
        """The next cell for a free worker, of those that no other bench has computed since."""
        for elsewhere in [cell for cell in self._waiting if cell.path.exists()]:
            self._waiting.remove(elsewhere)
            self._total -= _tokens(elsewhere)
        if not self._waiting:
            return None
        own = self._prepared.get(worker)
        others = {key for other, key in self._prepared.items() if other != worker}
        cell = min(  # the first of several that are equally good
            self._waiting, key=lambda cell: (cell.round, cell.preparation != own, cell.preparation in others)
        )
        self._waiting.remove(cell)
        if not (self._done or self._running):
            self._begun = time.monotonic()  # what workers took to start says nothing of the pace
        self._prepared[worker] = cell.preparation
        self._running[worker] = cell
        left = ""
        if self._done:
            seconds = (time.monotonic() - self._begun) / self._done * (self._total - self._done)
            left = f", {clock(seconds)} left in all"
        number = self._count - len(self._waiting)
        self._reporter.print(f"{cell.title}: cell {number} of {self._count}: {cell.name}{left}")
        priors = [each.config.prior for each in self._cells if each.preparation == cell.preparation]
        heuristics = tuple((prior.name, prior.options) for prior in priors if prior.name != "none")
        plugins = foreign_plugins(used_plugins(cell.config).values())
        return Job(cell, heuristics, self._parents[cell.bench], local_places(cell.config), plugins)

    def done(self, worker: int, answer: None = None) -> None:
        """Take note that the worker's cell is written, or that it was left to another bench, which took no time."""
        cell = self._running.pop(worker)
        if cell.path.exists():
            self._done += _tokens(cell)
        else:
            self._total -= _tokens(cell)

    def failed(self, worker: int, error: Exception) -> bool:
        """Leave out a cell that failed, unless the others would fail, too; see `Queue`."""
        cell = self._running.pop(worker)
        if not isinstance(error, FFGymError):
            return False
        if isinstance(error, self._stopping):
            error.message = f"{cell.name}: {error.message}"
            error.hint = f"{error.hint or ''} {GOES_ON}".lstrip()
            return False
        self._total -= _tokens(cell)
        self._reporter.print(f"{cell.name}: failed: {error.message}")
        self.failures.append(Failure(cell.name, str(error), "".join(traceback.format_exception(error))))
        return True

    def lost(self, worker: int) -> None:
        """Have a cell computed again by another worker, which goes on from its log."""
        cell = self._running.pop(worker)
        self._prepared.pop(worker, None)
        self._losses[cell.key] += 1
        if self._losses[cell.key] >= ATTEMPTS:
            raise too_often(cell.name)
        self._waiting.insert(0, cell)

    def patience(self, worker: int) -> float | None:
        """A cell may take any time."""
        return None


def _tokens(cell: Cell) -> int:
    """About how many tokens a cell evaluates: a rule's takes a fraction of a search's, and so does its time."""
    config = cell.config
    search, report_tokens = config.search, config.data.report_tokens
    spent = search.episodes * search.episode_tokens
    agent: Agent = manager.create("agent", config.agent.name, config.agent.options)
    if not agent.searches:
        return spent + report_tokens
    finals = expected_tokens(search.finalists, search.final_tokens, agent.recommendations, config.final_windows)
    return spent + finals + cell.marks * report_tokens
