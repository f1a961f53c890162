"""One cell of a bench: one agent with one seed in one configuration, searched and then measured on the report split.

A cell writes one small JSON file. One that was interrupted goes on from the log of its episodes, so at most the update
in flight is lost, and in its MLflow run. Each dtype, number of threads, starting policy and edition of a plugin has a
log of its own, so that no search is made of two, and a lock lets several benches work through the same cells without
doing one twice. Incumbents are noted at log-spaced token marks while the search runs and measured on the report split
when it has ended; nothing selects on those figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffgym.bench.table import CellResult, Final, Mark
from ffgym.config.tables import RunConfig
from ffgym.config.toml import digest, settings, to_toml
from ffgym.errors import DataError
from ffgym.files import FileFormat, disk_errors, exclusive_lock, write_text
from ffgym.interrupts import held_back_interrupts
from ffgym.pipeline.agent import make_agent, policy_digest
from ffgym.pipeline.artifacts import log_splits, run_tags
from ffgym.pipeline.search import tracked_search
from ffgym.pipeline.task import Task, give_prior, on_report, open_task, with_config
from ffgym.plugins.bases import Agent
from ffgym.prepare import configured
from ffgym.prepare.workers import ForeignPlugin, check_installed, check_seen
from ffgym.report.progress import Reporter
from ffgym.search.finalists import finalists
from ffgym.search.loop import SearchResult
from ffgym.tracking.names import Result
from ffgym.tracking.tracker import Tracker
from ffgym.types import Allocation, Episode, Evaluation, JSONDict, perplexity_of

DELETE_IT = "Delete it to compute it again."
CELL_RESULT = FileFormat("bench result", CellResult, DataError, DELETE_IT)
MLFLOW_NOTE = FileFormat("note of an MLflow run", str, DataError, DELETE_IT)


@dataclass(frozen=True)
class Cell:
    """One agent, one seed, one configuration."""

    label: str
    seed: int
    config: RunConfig
    path: Path
    bench: Path  # the file that asks for it
    title: str  # of that bench
    round: int  # which of its agent's seeds it has, from 0: first seeds are computed first
    marks: int  # at how many token marks the incumbent is measured, >= 2
    plain: bool = False  # what was found is also measured without any refit

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.label}, seed {self.seed}"

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides the cell's numbers."""
        return digest(self.config)

    @property
    def key(self) -> str:
        """Names its lock and its log: what it computes, and the file that waits for it.

        Two benches that need the same for files of their own compute it each, or one file would never be written.
        """
        return f"{self.digest[:16]}-{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:8]}"

    @property
    def preparation(self) -> str:
        """Cells in which this is equal can share a prepared model."""
        config = self.config
        prune = config.prune.model_dump(exclude={"sparsity"})
        parts = [config.model, config.data, config.criterion]
        return json.dumps([*(part.model_dump() for part in parts), prune], sort_keys=True)


@dataclass(frozen=True)
class Job:
    """A cell to compute."""

    cell: Cell
    # (name, options) of every heuristic that cells on the same prepared model ask for
    heuristics: tuple[tuple[str, JSONDict], ...]
    parent: str | None  # MLflow run that the cell's is a child of; None where tracking is off
    places: tuple[str, ...] = ()  # model and texts where the bench has found them, which a worker's machine must see
    plugins: tuple[ForeignPlugin, ...] = ()  # which it must have


class CellRunner:
    """Computes cells one after another and keeps the prepared model for as long as the next cell can use it."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._task: Task | None = None
        self._preparation = ""
        self._dense_loss: float | None = None

    def __call__(self, job: Job) -> None:
        """Compute one cell and write its file, unless another bench does or has done so since."""
        cell, folder = job.cell, job.cell.config.tracking.folder / "bench"
        check_installed(job.plugins)
        for place in job.places:
            check_seen(place)
        with ExitStack() as stack:
            with disk_errors():
                folder.mkdir(parents=True, exist_ok=True)
                mine = stack.enter_context(exclusive_lock(folder / f"{cell.key}.lock"))
            if not mine:
                self._reporter.print(f"{cell.name}: skipped: another bench is computing it")
            elif not cell.path.exists():
                self._prepare_and_compute(job, folder)

    def _prepare_and_compute(self, job: Job, folder: Path) -> None:
        cell = job.cell
        if self._task is None or self._preparation != cell.preparation:
            self._task = self._dense_loss = None  # two models at once may not fit
            self._preparation = cell.preparation
            self._task = open_task(cell.config, job.heuristics, self._reporter)
        with disk_errors():
            self._compute(job, with_config(self._task, cell.config), folder)

    def _compute(self, job: Job, task: Task, folder: Path) -> None:
        cell, config = job.cell, job.cell.config
        agent = make_agent(config)
        give_prior(agent, task)
        log = folder / _log_name(cell, task)
        note = log.with_suffix(".run")
        watch = _Incumbents(task, agent, cell.marks)
        run = noted_run(config, f"{cell.title}: {cell.name}", note, self._reporter, parent=job.parent)
        with ExitStack() as ending, run as tracker:
            tracker.log_config(config.model_dump(mode="json"), to_toml(config))
            tracker.set_tags(run_tags(task))
            log_splits(tracker, task.splits)
            (found,) = tracked_search(task, agent, self._reporter, tracker, cell.name, log, on_update=watch.update)
            watch.end()
            result = self._result(cell, task, found, watch.noted)
            tracker.log_result(_tracked(result, task, found))
            # The step is the number of tokens evaluated, so that MLflow charts the same curve as the bench's picture.
            tracker.log_metrics([("search/incumbent", perplexity_of(mark.loss), mark.tokens) for mark in result.marks])
            # A cell whose file exists is never computed again, so its MLflow run has to end now.
            ending.enter_context(held_back_interrupts(first_only=True))
            write_result(cell.path, result)
            tracker.log_artifact(cell.path)
            for path in (log, note):
                path.unlink(missing_ok=True)

    def _result(
        self, cell: Cell, task: Task, found: SearchResult, noted: Sequence[tuple[int, Allocation]]
    ) -> CellResult:
        known: dict[tuple[int, ...], Evaluation] = {}
        with self._reporter.stage("report split", len(noted) + 2 + cell.plain) as stage:

            def measured(kept: tuple[int, ...]) -> Evaluation:
                if kept not in known:
                    known[kept] = on_report(task, kept)
                stage.advance()
                return known[kept]

            marks = [Mark(tokens=tokens, loss=measured(allocation.kept).loss) for tokens, allocation in noted]
            best = found.best.allocation
            chosen = measured(best.kept)
            final = Final(
                kept=list(best.kept),
                loss=chosen.loss,
                sparsity=best.sparsity,
                origin=found.best.origin,
                losses=list(chosen.losses),
            )
            if cell.plain:
                final.plain_loss = on_report(task, best.kept, calibrated=False).loss
                stage.advance()
            if self._dense_loss is None:
                self._dense_loss = on_report(task, task.prepared.prunable.dense_units).loss
            stage.advance()
        return CellResult(
            label=cell.label,
            agent=cell.config.agent.name,
            seed=cell.seed,
            settings=settings(cell.config),
            target=cell.config.prune.target,
            dense_loss=self._dense_loss,
            report_tokens=task.splits.report.predicted_tokens,
            search_tokens=found.search_tokens,
            final_tokens=found.final_tokens,
            episodes=len(found.history),
            seconds=round(found.seconds, 1),
            threads=torch.get_num_threads(),
            dtype=task.loaded.dtype_name,
            policy=policy_digest(cell.config),
            latency=_measured_digest(task),
            editions=configured.editions(cell.config),
            asked_marks=cell.marks,
            marks=marks,
            final=final,
        )


def _tracked(result: CellResult, task: Task, found: SearchResult) -> Result:
    """What MLflow calls the result of the cell."""
    return Result(
        perplexity=perplexity_of(result.final.loss),
        dense_perplexity=perplexity_of(result.dense_loss),
        sparsity=result.final.sparsity,
        params=task.sizes(result.final.kept)["params"],
        search_tokens=result.search_tokens,
        seconds=result.seconds,
        accuracy=found.best.objectives.get("accuracy"),
    )


def _measured_digest(task: Task) -> str | None:
    """Digest of the measurement that the budget counts; ``None`` where it counts a price."""
    return next((measurement.digest for measurement in task.measurements.values()), None)


def _log_name(cell: Cell, task: Task) -> str:
    """Name of the log of a cell's search: everything that decides an episode's bits."""
    parts = [cell.key, task.loaded.dtype_name]  # "auto" may mean another dtype in the next sitting
    parts += [
        f"{torch.get_num_threads()}threads",
        policy_digest(cell.config) or "",
        (_measured_digest(task) or "")[:16],
    ]
    parts += [f"{table}{edition}" for table, edition in configured.editions(cell.config).items()]
    return f"{'-'.join(filter(None, parts))}.jsonl"


def write_result(path: Path, result: CellResult) -> None:
    """Write a result file, whole or not at all."""
    write_text(path, result.model_dump_json(indent=1) + "\n")


@contextmanager
def noted_run(config: RunConfig, name: str, note: Path, reporter: Reporter, **options: Any) -> Iterator[Tracker]:
    """An MLflow run whose id is noted in a file, so that it goes on in the same one when interrupted."""
    table, resume = config.tracking, MLFLOW_NOTE.text(note) if note.exists() else None
    shared: dict[str, Any] = {"command": "ffgym bench", "notify": reporter.print, "unsent": note.parent}
    run = Tracker(table.folder, table.experiment, name, table.enabled, resume=resume, **shared, **options)
    with run as tracker:
        if tracker.run_id is not None:
            write_text(note, tracker.run_id)
        yield tracker


class _Incumbents:
    """Notes the allocation that the search would have returned at each of the token marks."""

    def __init__(self, task: Task, agent: Agent, marks: int) -> None:
        search, env = task.config.search, task.env
        budget = search.episodes * env.episode_tokens
        self.noted: list[tuple[int, Allocation]] = []
        self._task, self._agent = task, agent
        self._history: list[Episode] = []
        update = agent.update_cost(search.episodes_per_update) * env.episode_tokens
        self._marks = np.unique(np.geomspace(min(update, budget), budget, marks).astype(int)).tolist()

    def update(self, episodes: Sequence[Episode]) -> None:
        """Note the incumbent where a mark has been passed; the agent's own recommendation goes first."""
        self._history += episodes
        spent = self._spent
        left = [mark for mark in self._marks if mark > spent]
        if len(left) < len(self._marks):
            self._marks = left
            self._note()

    def end(self) -> None:
        """Note the result of a search that ended before the first mark, as the one episode of a rule may."""
        if not self.noted:
            self._note()

    @property
    def _spent(self) -> int:
        return sum(episode.tokens for episode in self._history)

    def _note(self) -> None:
        env = self._task.env
        (incumbent,) = finalists(env, self._agent, self._history, 1, env.sparsity)
        self.noted.append((self._spent, incumbent.allocation))
