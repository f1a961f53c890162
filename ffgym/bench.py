"""Many runs on equal terms: every agent on the same environment, splits and number of evaluated tokens.

One *cell* is one agent with one seed in one configuration. It writes one small JSON file, named by agent and seed and
keyed by the digest of everything that decides its numbers; what is there already is not computed again. A cell that was
interrupted goes on from the log of its episodes, so at most the episode in flight is lost.

Incumbents are noted at log-spaced token marks while the search runs and measured on the report split when it has ended;
nothing selects on those figures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from rich.console import Console

from ffgym import runner
from ffgym.config import RunConfig, Table, config_error, digest, read_toml, to_toml
from ffgym.errors import ConfigError, DataError
from ffgym.evaluation.perplexity import evaluate
from ffgym.output import disk_errors, write_text
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.policy import make_agent
from ffgym.report.bench import BenchTable, CellResult, bench_figure, bench_table, markdown
from ffgym.report.progress import Reporter
from ffgym.search import Found, by_standing, search
from ffgym.tracking import Tracker, environment_tags
from ffgym.types import Allocation, Episode, JSONDict, Update

MARKS = 6


class BenchFile(Table):
    """One bench: a TOML file.

    Attributes:
        title: what the table is called.
        agents: names of agents or heuristics, or of entries of ``variants``.
        seeds: one cell per agent and seed; heuristics, which draw nothing, run the first seed only.
        results: folder of the cells' JSON files, relative to the file.
        baseline: whose final quality the others' tokens are counted to.
        run: tables of ``RunConfig`` that all cells share.
        variants: named changes of the configuration, each a set of tables (``agent.name`` says who searches).
    """

    title: str
    agents: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    results: str
    baseline: str = "evolution"
    run: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One agent, one seed, one configuration."""

    label: str
    seed: int
    config: RunConfig
    path: Path

    @property
    def digest(self) -> str:
        """Of everything that decides the cell's numbers."""
        return digest(self.config)


@dataclass(frozen=True)
class Bench:
    """A bench file, read and expanded."""

    file: Path
    spec: BenchFile
    cells: tuple[Cell, ...]


def bench(files: Sequence[Path], *, progress: Console | None = None, only_report: bool = False) -> list[BenchTable]:
    """Run what is missing of every bench, then write its table and figure beside the results.

    Args:
        files: bench TOML files; they must agree on the model.
        progress: where progress goes; stderr where left out.
        only_report: compute nothing, show what is there.

    Raises:
        ConfigError: no agents, mixed models, fewer episodes than one update, or results of another configuration.
    """
    say = Reporter(progress or Console(stderr=True))
    benches = [read_bench(file) for file in files]
    check_benches(benches)
    tables = []
    for each in benches:
        missing = [] if only_report else [cell for cell in each.cells if not cell.path.exists()]
        if missing:
            with disk_errors():
                _run_cells(each, missing, say)
        results = [read_cell(cell) for cell in each.cells if cell.path.exists()]
        if not results:
            say.say(f"{each.spec.title}: no results yet")
            continue
        table = bench_table(each.spec.title, results, baseline=each.spec.baseline)
        folder = each.file.parent
        bench_figure(table, results, folder / f"{each.file.stem}.png")
        write_text(folder / f"{each.file.stem}.md", markdown(table))
        tables.append(table)
    return tables


def read_bench(file: Path) -> Bench:
    """Read one bench file and expand its cells, every configuration validated."""
    try:
        spec = BenchFile.model_validate(read_toml(file))
    except ValidationError as error:
        raise config_error(error, BenchFile) from None
    for key, values in (("agents", spec.agents), ("seeds", spec.seeds)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{file}: {key} = {values} names one of them twice", hint="Name each once.")
    folder = file.parent / spec.results
    cells = []
    for label in spec.agents:
        changes = spec.variants.get(label, {"agent": {"name": label}})
        for seed in spec.seeds:
            config = _resolved(spec.run, changes, seed)
            if config.agent.name == "one-shot" and seed != spec.seeds[0]:
                continue
            cells.append(Cell(label, seed, config, folder / f"{label}-seed{seed}.json"))
    return Bench(file, spec, tuple(cells))


def check_benches(benches: Sequence[Bench]) -> None:
    """Refuse what cannot be compared, before anything is computed."""
    cells = [cell for each in benches for cell in each.cells]
    models = {cell.config.model.name: cell for cell in cells}
    if len(models) > 1:
        raise ConfigError(
            f"one bench compares on one model, these name {', '.join(sorted(models))}",
            hint="Give the files of each model in a call of their own.",
        )
    digests: dict[Path, str] = {}
    for cell in cells:
        runner.check_plugins(cell.config)
        manager.create("agent", cell.config.agent.name, cell.config.agent.options)
        if digests.setdefault(cell.path.resolve(), cell.digest) != cell.digest:
            raise ConfigError(
                f"two benches would write {cell.path} for different configurations",
                hint="Give each a `results` folder of its own.",
            )
        if cell.path.exists() and read_cell(cell).digest != cell.digest:
            raise ConfigError(
                f"{cell.path} holds the result of another configuration",
                hint="Point `results` at another folder, or delete that file to compute it again.",
            )


def read_cell(cell: Cell) -> CellResult:
    """The result file of a cell."""
    try:
        return CellResult.model_validate_json(cell.path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise DataError(f"{cell.path} is not a bench result: {error}", hint="Delete it to compute it again.") from error


def _run_cells(each: Bench, cells: Sequence[Cell], say: Reporter) -> None:
    """Compute the cells, those that share a prepared model one after another."""
    root = Path(cells[0].config.tracking.root)
    tracking = cells[0].config.tracking
    with Tracker(root, tracking.experiment, each.spec.title, tracking.enabled) as parent:
        parent.log_config(each.spec.model_dump(mode="json"), each.file.read_text(encoding="utf-8"))
        space, key = None, ""
        begun = time.monotonic()
        priors = {c.config.prior.name: c.config.prior.options for c in cells if c.config.prior.name != "none"}
        for done, cell in enumerate(sorted(cells, key=_preparation_key)):
            if space is None or _preparation_key(cell) != key:
                space, key = None, _preparation_key(cell)
                space = runner.open_workspace(cell.config, list(priors.items()), say)
            left = (time.monotonic() - begun) / done * (len(cells) - done) if done else math.nan
            note = "" if math.isnan(left) else f", about {left / 60:.0f} min left"
            say.say(f"{each.spec.title}: cell {done + 1} of {len(cells)}: {cell.label}, seed {cell.seed}{note}")
            _run_cell(cell, runner.with_config(space, cell.config), parent.run_id, say)


def _run_cell(cell: Cell, space: runner.Workspace, parent: str | None, say: Reporter) -> None:
    config = cell.config
    agent = make_agent(config)
    if config.prior.name != "none":
        agent.prior_mean = space.prior(config.prior.name, config.prior.options)
    log = Path(config.tracking.root) / "bench" / f"{cell.digest[:16]}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    watch = _Incumbents(space, agent, config.search.episodes * space.env.episode_windows * space.env.window_tokens)
    with Tracker(
        Path(config.tracking.root),
        config.tracking.experiment,
        f"{cell.label}-seed{cell.seed}",
        config.tracking.enabled,
        parent=parent,
    ) as tracker:
        tracker.log_config(config.model_dump(mode="json"), to_toml(config))
        tracker.set_tags(environment_tags(device=str(space.loaded.device), threads=torch.get_num_threads(), plugins={}))
        with say.stage(f"{cell.label}, seed {cell.seed}", watch.budget) as stage:

            def on_episode(episode: Episode) -> None:
                watch.episode(episode)
                stage.advance(episode.tokens, f"tokens, reward {episode.reward:.3f}")

            def on_update(episodes: Sequence[Episode], update: Update) -> None:
                watch.update()
                tracker.log_episodes(episodes, update.diagnostics)

            found = search(
                space.env,
                agent,
                config.search,
                runner.make_schedule(config, space.env),
                seed=cell.seed,
                log=log,
                on_episode=on_episode,
                on_update=on_update,
            )
        result = _result(cell, space, found, watch, say)
        tracker.log_metrics([("report/perplexity", result.final.perplexity, 0)])
    write_text(cell.path, result.model_dump_json(indent=1) + "\n")
    log.unlink(missing_ok=True)


class _Incumbents:
    """Notes whom the search would have handed over at each of the token marks."""

    def __init__(self, space: runner.Workspace, agent: Agent, budget: int) -> None:
        self.budget = budget
        self.noted: list[tuple[int, Allocation]] = []
        self._space, self._agent = space, agent
        self._history: list[Episode] = []
        self._spent = 0
        first = max(1, config_update_tokens(space))
        self._marks = np.unique(np.geomspace(min(first, budget), budget, MARKS).astype(int)).tolist()

    def episode(self, episode: Episode) -> None:
        """Take note of one episode."""
        self._history.append(episode)
        self._spent += episode.tokens

    def update(self) -> None:
        """Note the incumbent where a mark has been passed; the agent's own recommendation goes first."""
        passed = [mark for mark in self._marks if mark <= self._spent]
        if not passed:
            return
        self._marks = [mark for mark in self._marks if mark > self._spent]
        env = self._space.env
        recommended = self._agent.recommend(np.array([env.sparsity, 1.0], dtype=np.float32))
        action = recommended[0] if recommended else by_standing(self._history)[0].action
        self.noted.append((self._spent, env.budget.project(action, env.sparsity)))


def config_update_tokens(space: runner.Workspace) -> int:
    """Tokens of one update at full fidelity."""
    return space.config.search.episodes_per_update * space.env.episode_windows * space.env.window_tokens


def _result(cell: Cell, space: runner.Workspace, found: Found, watch: _Incumbents, say: Reporter) -> CellResult:
    silent = Reporter(Console(quiet=True))
    prunable, windows = space.prepared.prunable, space.splits.report.windows
    batch = space.env.tokens_per_batch
    known: dict[tuple[int, ...], float] = {}

    def loss(kept: tuple[int, ...]) -> float:
        if kept not in known:
            with runner.cut_to(space, kept, "ridge", silent):
                known[kept] = evaluate(prunable.model, windows, tokens_per_batch=batch).loss
        return known[kept]

    with say.stage("report split", len(watch.noted) + 2) as stage:
        marks: list[JSONDict] = []
        for tokens, allocation in watch.noted:
            marks.append({"tokens": tokens, "loss": loss(allocation.kept)})
            stage.advance()
        best = found.best.allocation
        final = {
            "kept": list(best.kept),
            "loss": loss(best.kept),
            "sparsity": best.sparsity,
            "origin": found.best.origin,
        }
        stage.advance()
        dense = loss(prunable.dense_units)
        stage.advance()
    return CellResult.model_validate(
        {
            "label": cell.label,
            "agent": cell.config.agent.name,
            "seed": cell.seed,
            "digest": cell.digest,
            "target": cell.config.prune.sparsity,
            "dense_loss": dense,
            "report_tokens": windows.shape[0] * (windows.shape[1] - 1),
            "search_tokens": found.search_tokens,
            "final_tokens": found.final_tokens,
            "episodes": len(found.history),
            "seconds": round(found.seconds, 1),
            "threads": torch.get_num_threads(),
            "dtype": str(space.loaded.dtype).removeprefix("torch."),
            "marks": marks,
            "final": final,
        }
    )


def _resolved(run: dict[str, Any], changes: dict[str, Any], seed: int) -> RunConfig:
    tables = {name: {**run.get(name, {}), **changes.get(name, {})} for name in {*run, *changes}}
    try:
        return manager.resolve_agent(RunConfig.model_validate({**tables, "seed": seed}))
    except ValidationError as error:
        raise config_error(error, RunConfig) from None


def _preparation_key(cell: Cell) -> str:
    config = cell.config
    prune = config.prune.model_dump(exclude={"sparsity"})
    parts = [config.model, config.data, config.criterion]
    return json.dumps([*(part.model_dump() for part in parts), prune], sort_keys=True)
