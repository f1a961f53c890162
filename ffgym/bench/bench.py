"""Many runs on equal terms: every agent on the same environment, splits and number of evaluated tokens.

One *cell* is one agent with one seed in one configuration (`ffgym.bench.cell`). It writes one small JSON file, named by
agent and seed, with all settings that decide its numbers; what is there already is not computed again. The cells of all
files form one queue: the first seed of everything comes first.
"""

from __future__ import annotations

import difflib
import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from rich.console import Console

from ffgym.bench.cell import CELL_RESULT, MLFLOW_NOTE, Cell, CellRunner, Job, write_result
from ffgym.bench.table import BenchTable, CellResult, bench_figure, bench_table, markdown
from ffgym.config.refusals import config_error
from ffgym.config.tables import RunConfig, Table
from ffgym.config.toml import CONFIGURATION, PLUGIN_TABLES, read_toml, without_foreign_options
from ffgym.errors import ConfigError
from ffgym.execute.workers import work
from ffgym.files import disk_errors, write_text
from ffgym.pipeline.settle import check_plugins
from ffgym.plugins import configured, manager
from ffgym.prepare.parts import counted_resources, named_table, table_digest
from ffgym.report.progress import Reporter, duration
from ffgym.search.policy import make_agent, policy_digest
from ffgym.tracking.tracker import Tracker
from ffgym.types import JSONDict


class BenchFile(Table):
    """One bench: a TOML file.

    Attributes:
        title: what the table is called.
        agents: names of agents or heuristics, or of entries of ``variants``.
        seeds: one cell per agent and seed; heuristics, which draw nothing, run the first seed only.
        results: folder of the cells' JSON files, relative to the file.
        baseline: whose final quality the others' tokens are counted to.
        marks: at how many token marks, log-spaced, the incumbent is measured on the report split; the last is the end.
        plain: also measure what was found without any refit.
        run: tables of ``RunConfig`` that all cells share.
        variants: named changes of the configuration, each a set of tables (``agent.name`` says who searches).
    """

    title: str
    agents: list[str] = Field(min_length=1, description="names of agents or heuristics (see: ffgym ls agents)")
    seeds: list[int] = Field(min_length=1, description="whole numbers, one cell per agent and seed, e.g. [0, 1, 2]")
    results: str
    baseline: str = "evolution"
    marks: int = Field(default=6, ge=2)
    plain: bool = False
    run: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A bench file, read and expanded."""

    file: Path
    spec: BenchFile
    cells: tuple[Cell, ...]


def bench(
    files: Sequence[str | Path], *, progress: Console | None = None, only_report: bool = False, jobs: int = 1
) -> list[BenchTable]:
    """Run what is missing of every bench, then write the tables and figures beside the results.

    Args:
        files: bench TOML files; they must agree on the model.
        progress: where progress goes; stderr where left out.
        only_report: compute nothing, show what is there.
        jobs: cells that are computed at the same time, each in a process of its own, which share torch's threads.

    Raises:
        ConfigError: no agents, mixed models, unequal terms, updates that are too small, or results of another
            configuration.
    """
    reporter = Reporter(progress or Console(stderr=True))
    benches = [read_bench(Path(file)) for file in files]
    check_benches(benches)
    for each in benches:
        if each.spec.baseline not in each.spec.agents:
            reporter.print(
                f"{each.spec.title}: baseline {each.spec.baseline!r} is not one of its agents: no tokens are counted"
            )
    tables = []
    with ExitStack() as stack:
        runs: dict[Path, Tracker] = {}
        if not only_report:
            with disk_errors():
                share(benches)
                missing = _missing(benches)
                runs = _open_runs(benches, missing, stack)
                if missing:
                    parents = {file: tracker.run_id for file, tracker in runs.items()}
                    compute(missing, parents, reporter, processes=jobs, threads=max(1, torch.get_num_threads() // jobs))
                    share(benches)
        for each in benches:
            results = [read_cell(cell) for cell in each.cells if cell.path.exists()]
            if not results:
                reporter.print(f"{each.spec.title}: no results yet")
                continue
            tables.append(_write_table(each, results, runs.get(each.file)))
            if each.file in runs:
                _parent_note(each).unlink(missing_ok=True)
    return tables


def _write_table(bench: Bench, results: Sequence[CellResult], run: Tracker | None) -> BenchTable:
    """The table and its picture beside the bench file, and in its MLflow run where there is one."""
    table = bench_table(bench.spec.title, results, baseline=bench.spec.baseline)
    picture, text = bench.file.with_suffix(".png"), bench.file.with_suffix(".md")
    bench_figure(table, results, picture)
    write_text(text, markdown(table))
    if run is not None:
        run.log_artifact(text)
        run.log_artifact(picture)
    return table


def read_bench(file: Path) -> Bench:
    """Read one bench file and expand its cells, every configuration validated."""
    file = file.expanduser()
    try:
        spec = BenchFile.model_validate(read_toml(file))
    except ValidationError as error:
        problem = config_error(error, BenchFile)
        raise ConfigError(f"{file}: {problem.message}", hint=problem.hint) from None
    for key, values in (("agents", spec.agents), ("seeds", spec.seeds)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{file}: {key} = {values} names one of them twice", hint="Name each once.")
    if unused := sorted(set(spec.variants) - set(spec.agents)):
        raise ConfigError(
            f"{file}: variants has {', '.join(map(repr, unused))}, which agents does not name",
            hint=f"Named in agents: {', '.join(spec.agents)}.",
        )
    near = difflib.get_close_matches(spec.baseline, spec.agents, n=1, cutoff=0.75)
    if near and spec.baseline not in spec.agents:  # a typing error; one that is far from all of them is only said
        raise ConfigError(
            f"{file}: baseline {spec.baseline!r} is none of its agents",
            hint=f"Did you mean {near[0]!r}? Named in agents: {', '.join(spec.agents)}.",
        )
    if "seed" in spec.run or any("seed" in changes for changes in spec.variants.values()):
        raise ConfigError(f"{file} sets `seed` for a run, and a bench runs several", hint="Use `seeds`.")
    folder = file.parent / spec.results
    cells = []
    for label in spec.agents:
        if Path(label).name != label:
            raise ConfigError(f"{file}: agents has {label!r}, which cannot name a file", hint="Leave the slash out.")
        changes = spec.variants.get(label, {"agent": {"name": label}})
        for seed in spec.seeds:
            try:
                config = _resolved(spec.run, changes, seed)
            except ConfigError as error:
                raise ConfigError(f"{file}, {label}: {error.message}", hint=error.hint) from None
            if config.agent.name == "one-shot" and seed != spec.seeds[0]:
                continue
            cells.append(Cell(label, seed, config, folder / f"{label}-seed{seed}.json", spec.marks, spec.plain))
    return Bench(file, spec, tuple(cells))


def check_benches(benches: Sequence[Bench]) -> None:
    """Refuse what cannot be compared, before anything is computed."""
    cells = [cell for each in benches for cell in each.cells]
    models = {_model(cell.config) for cell in cells}
    if len(models) > 1:
        raise ConfigError(
            f"one bench compares on one model, these name {', '.join(sorted(models))}",
            hint="Call `ffgym bench` once for each model.",
        )
    for each in benches:
        _check_equal_terms(each)
    digests: dict[Path, str] = {}
    for cell in cells:
        if cell.config.prune.is_range:
            raise ConfigError(
                f"a bench compares at one target, and {cell.label} has prune.sparsity = {cell.config.prune.sparsity!r}",
                hint="Give one target, e.g. sparsity = 0.2; experiments/range compares fronts.",
            )
        if cell.config.recover.method != "none":
            raise ConfigError(
                f"a bench compares searches, and {cell.label} has recover.method = {cell.config.recover.method!r}",
                hint="Leave [recover] out, and recover a saved model with `ffgym recover`.",
            )
        check_plugins(cell.config)
        _check_measurements(cell)
        if digests.setdefault(cell.path.resolve(), cell.digest) != cell.digest:
            raise ConfigError(
                f"two benches would write {cell.path} for different configurations",
                hint="Give each a `results` folder of its own.",
            )
        if cell.path.exists():
            stored = read_cell(cell)
            changed = configured.changed_since(stored.settings, cell.config) + _unsaid(stored, cell)
            changed += _outgrown(stored.editions, configured.editions(cell.config))
            policy = policy_digest(cell.config)
            if None not in (policy, stored.policy) and policy != stored.policy:
                changed.append(f"search.init_from = {cell.config.search.init_from!r} holds another policy now")
            if stored.latency != table_digest(cell.config):
                changed.append(f"prune.latency_table = {cell.config.prune.latency_table!r} holds other times now")
            if changed:
                raise ConfigError(
                    f"{cell.path} holds the result of another configuration: {'; '.join(changed)}",
                    hint="Point `results` at another folder, or delete that file to compute it again.",
                )


def _check_measurements(cell: Cell) -> None:
    """Refuse a cell that would measure what its resources cost."""
    for name, resource in counted_resources(cell.config).items():
        if resource.is_measured() and named_table(cell.config, name) is None:
            key = resource.table_key
            hint = f"Make a table with `ffgym {name} MODEL --output FILE`, and name it as prune.{key}."
            raise ConfigError(
                f"cells of one table count the same {name}, and {cell.label} names none: two sittings, or two "
                "processes that measure the model at once, would each count their own",
                hint=hint if key else "Take a resource that has a price per unit.",
            )


def _outgrown(stored: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """Which tables' plugins have come to give other numbers since a result was stored."""
    return [
        f"the plugin of [{table}] was of edition {stored.get(table, 1)} and is of edition {now.get(table, 1)} now"
        for table in sorted({*stored, *now})
        if stored.get(table, 1) != now.get(table, 1)
    ]


def _unsaid(stored: CellResult, cell: Cell) -> list[str]:
    """What a result of the same work does not say and the cell asks for."""
    unsaid = []
    if cell.plain and stored.final.plain_loss is None:
        unsaid.append("plain was false and is true now")
    if stored.asked_marks < cell.marks and cell.config.agent.name != "one-shot":
        unsaid.append(f"marks was {stored.asked_marks} and is {cell.marks} now")
    return unsaid


def _model(config: RunConfig) -> str:
    """Which model a configuration names, its revision included."""
    return config.model.name if config.model.revision is None else f"{config.model.name} at {config.model.revision}"


def _check_equal_terms(bench: Bench) -> None:
    """Refuse cells of one table that differ in splits, in what the budget counts, or in tokens to search for."""
    first: dict[str, tuple[Cell, Any]] = {}
    for cell in bench.cells:
        for term, value in _terms(cell.config).items():
            other, expected = first.setdefault(term, (cell, value))
            if value != expected:
                raise ConfigError(
                    f"{bench.file}: one table compares on equal terms, and {term} is {expected!r} for {other.label} "
                    f"and {value!r} for {cell.label}",
                    hint="Write a bench file for each.",
                )


def _terms(config: RunConfig) -> JSONDict:
    """What has to be the same in all cells of one table; a rule searches nothing, so its search may differ."""
    search, data = config.search, config.data
    terms = {"prune.resource": config.prune.resource, "prune.latency_table": config.prune.latency_table}
    terms |= {f"data.{key}": value for key, value in data.model_dump(mode="json").items()}
    if config.agent.name == "one-shot":
        return terms
    episode = -(-search.episode_tokens // data.window) * data.window
    update = manager.create("agent", config.agent.name, config.agent.options).update_cost(search.episodes_per_update)
    return {
        **terms,
        "the search's tokens (episodes in whole updates, of whole windows)": (
            -(-search.episodes // update) * update * episode
        ),
        "search.finalists x search.final_tokens": search.finalists * search.final_tokens,
    }


def share(benches: Sequence[Bench]) -> None:
    """Copy results to the cells of other benches, or of other labels, that would compute the very same."""
    cells = [cell for each in benches for cell in each.cells]
    finished = [cell for cell in cells if cell.path.exists()]
    for cell in cells:
        if cell.path.exists():
            continue
        twins = (read_cell(twin) for twin in finished if twin.digest == cell.digest)
        if result := next((twin for twin in twins if not _unsaid(twin, cell)), None):
            write_result(cell.path, result.model_copy(update={"label": cell.label}))


def read_cell(cell: Cell) -> CellResult:
    """The result file of a cell.

    Raises:
        DataError: it is damaged.
    """
    return CELL_RESULT.read(cell.path)


def _missing(benches: Sequence[Bench]) -> list[tuple[Bench, Cell]]:
    """What has to be computed, in the order of the files; cells that are the same work become one that says it all."""
    wanted: dict[str, tuple[Bench, Cell]] = {}
    for each in benches:
        for cell in each.cells:
            if not cell.path.exists():
                owner, twin = wanted.get(cell.digest, (each, cell))
                both = replace(twin, marks=max(twin.marks, cell.marks), plain=twin.plain or cell.plain)
                wanted[cell.digest] = owner, both
    return list(wanted.values())


def compute(
    cells: Sequence[tuple[Bench, Cell]],
    parents: Mapping[Path, str | None],
    reporter: Reporter,
    *,
    processes: int,
    threads: int,
) -> None:
    """Compute cells, one seed of everything first; cells that share a prepared model follow one another.

    Args:
        cells: what is missing, with the bench that each belongs to; at least one.
        parents: MLflow run of each bench file; ``None`` where tracking is off.
        reporter: where progress goes.
        processes: how many cells are computed at the same time, >= 1.
        threads: torch threads of each process.
    """
    queue = CellQueue(cells, parents, reporter)
    work(queue, CellRunner, reporter, processes=min(processes, len(cells)), threads=threads)


def _open_runs(
    benches: Sequence[Bench], missing: Sequence[tuple[Bench, Cell]], stack: ExitStack
) -> dict[Path, Tracker]:
    """One MLflow run per bench file that has something to compute, open until the stack is left.

    A bench that was interrupted goes on in the run it had, even if only its table is left to write: a note says which.

    Raises:
        ConfigError: an agent's updates are too small for it, or there is no policy to start from.
    """
    for _, cell in missing:
        make_agent(cell.config)  # now, and not after the cells before it have been computed
    runs: dict[Path, Tracker] = {}
    computing = {owner.file for owner, _ in missing}
    for each in benches:
        tracking, note = each.cells[0].config.tracking, _parent_note(each)
        earlier = MLFLOW_NOTE.text(note) if note.exists() else None
        if each.file in runs or (each.file not in computing and earlier is None):
            continue
        run = Tracker(tracking.folder, tracking.experiment, each.spec.title, tracking.enabled, resume=earlier)
        stack.enter_context(run).log_config(each.spec.model_dump(mode="json"), CONFIGURATION.text(each.file))
        if run.run_id is not None:
            write_text(note, run.run_id)
        runs[each.file] = run
    return runs


def _parent_note(bench: Bench) -> Path:
    """Where a bench that is under way notes its MLflow run, so that it goes on in the same one when interrupted."""
    name = hashlib.sha256(str(bench.file.resolve()).encode()).hexdigest()[:16]
    return bench.cells[0].config.tracking.folder / "bench" / f"{name}.run"


class CellQueue:
    """Hands out cells: first seeds first, and within them what the worker has the prepared model for.

    Args:
        cells: what is missing, in the order of the files.
        parents: MLflow run of each bench file.
        reporter: where progress goes.
    """

    def __init__(
        self, cells: Sequence[tuple[Bench, Cell]], parents: Mapping[Path, str | None], reporter: Reporter
    ) -> None:
        self._waiting = list(cells)
        self._parents = parents
        self._reporter = reporter
        self._prepared: dict[int, str] = {}  # what each worker has, or is computing with
        self._heuristics: dict[str, tuple[tuple[str, JSONDict], ...]] = {}
        for _, cell in cells:
            prior = cell.config.prior
            asked = self._heuristics.get(cell.preparation, ())
            if prior.name != "none" and (prior.name, prior.options) not in asked:
                self._heuristics[cell.preparation] = (*asked, (prior.name, prior.options))
        self._count, self._begun = len(cells), time.monotonic()
        self._running: dict[int, Cell] = {}
        self._done, self._total = 0, sum(_tokens(cell) for _, cell in cells)

    def take(self, worker: int) -> Job | None:
        """The next cell for a free worker, of those that no other bench has computed since."""
        for elsewhere in [pair for pair in self._waiting if pair[1].path.exists()]:
            self._waiting.remove(elsewhere)
            self._total -= _tokens(elsewhere[1])
        if not self._waiting:
            return None
        own = self._prepared.get(worker)
        others = {key for other, key in self._prepared.items() if other != worker}
        each, cell = min(  # the first one, where several are as good
            self._waiting, key=lambda p: (_round(p), p[1].preparation != own, p[1].preparation in others)
        )
        self._waiting.remove((each, cell))
        self._prepared[worker] = cell.preparation
        self._running[worker] = cell
        left = ""
        if self._done:
            seconds = (time.monotonic() - self._begun) / self._done * (self._total - self._done)
            left = f", about {duration(seconds)} left"
        number = self._count - len(self._waiting)
        self._reporter.print(f"{each.spec.title}: cell {number} of {self._count}: {cell.label}, seed {cell.seed}{left}")
        return Job(cell, self._heuristics.get(cell.preparation, ()), self._parents[each.file])

    def done(self, worker: int) -> None:
        """Take note that the worker's cell is written, or that it was left to another bench, which took no time."""
        cell = self._running.pop(worker)
        if cell.path.exists():
            self._done += _tokens(cell)
        else:
            self._total -= _tokens(cell)


def _tokens(cell: Cell) -> int:
    """About how many tokens a cell evaluates: a rule's takes a fraction of a search's, and so does its time."""
    search, data = cell.config.search, cell.config.data
    spent = search.episodes * search.episode_tokens
    if cell.config.agent.name == "one-shot":
        return spent + data.report_tokens
    return spent + search.finalists * search.final_tokens + cell.marks * data.report_tokens


def _round(pair: tuple[Bench, Cell]) -> int:
    """Which of its bench's seeds a cell has."""
    return pair[0].spec.seeds.index(pair[1].seed)


def _resolved(run: dict[str, Any], changes: dict[str, Any], seed: int) -> RunConfig:
    for name in PLUGIN_TABLES:
        run = without_foreign_options(run, changes, name)
    tables = dict(run)
    for name, table in changes.items():
        shared = run.get(name)
        tables[name] = {**shared, **table} if isinstance(shared, dict) and isinstance(table, dict) else table
    try:
        config = RunConfig.model_validate({**tables, "seed": seed})
    except ValidationError as error:
        raise config_error(error, RunConfig) from None
    return configured.with_options(configured.resolve_agent(config))
