"""``run(config)``: the whole pipeline on one page.

model, data -> statistics -> order -> refits -> search -> final calibration -> report -> saved model -> MLflow
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.config.toml import to_toml
from ffgym.export.checkpoint import SavedModel, load_line
from ffgym.files import disk_errors, write_text
from ffgym.pipeline.artifacts import (
    allocation_json,
    log_splits,
    run_tags,
    write_found,
    write_front,
    write_pareto,
    write_pictures,
    write_table,
)
from ffgym.pipeline.compare import (
    compared_rows,
    finish,
    finish_front,
    model_folder,
    reference_allocations,
    reference_rules,
    with_recovered,
)
from ffgym.pipeline.folder import (
    Session,
    claim_folder,
    clear_folder,
    contents,
    held,
    last_session,
    note_session,
    remove_half_written,
    removing_if_nothing_found,
    reopen_folder,
    saying_what_is_kept,
)
from ffgym.pipeline.task import Workspace, at_target, give_prior, make_schedule, open_workspace
from ffgym.plugins import configured, manager
from ffgym.plugins.bases import Agent
from ffgym.prepare.parts import make_reward
from ffgym.recover.recover import (
    Material,
    Recovered,
    check_method,
    gather,
    output_folder,
    train_and_save,
    unfinished_folder,
)
from ffgym.report.front import Front
from ffgym.report.front import as_dict as front_as_dict
from ffgym.report.front import terminal as front_terminal
from ffgym.report.progress import Reporter
from ffgym.report.table import ReportTable, as_dicts, terminal
from ffgym.search.log import read_episodes
from ffgym.search.loop import Found, SearchInterrupted, search_front
from ffgym.search.policy import make_agent
from ffgym.tracking.tracker import Tracker
from ffgym.types import Episode, JSONDict, Update


@dataclass(frozen=True)
class RunResult:
    """What a run hands back.

    Attributes:
        table: report-split figures, dense first.
        found: the search.
        folder: where everything was written.
        saved: the checkpoint, or ``None`` where none was wanted.
        recovered: what training after the final calibration brought, or ``None`` where none was wanted.
        mlflow_run: MLflow's run id, or ``None`` where tracking is off.
        front: under a range of budgets its points; ``table``, ``found`` and ``saved`` are those of the main target.
    """

    table: ReportTable
    found: Found
    folder: Path
    saved: SavedModel | None
    mlflow_run: str | None
    front: Front | None = None
    recovered: Recovered | None = None

    def to_json(self) -> JSONDict:
        """Numbers and paths, ready for ``json.dumps`` (NaN aside)."""
        return {
            "table": as_dicts(self.table),
            "measured": self.table.header,
            "allocation": allocation_json(self.found),
            "search_tokens": self.found.search_tokens,
            "final_tokens": self.found.final_tokens,
            "search_seconds": round(self.found.seconds, 1),
            "front": None if self.front is None else front_as_dict(self.front),
            "folder": str(self.folder),
            "model": None if self.saved is None else str(self.saved.path),
            "recovered_model": None if self.recovered is None else str(self.recovered.saved.path),
            "mlflow_run": self.mlflow_run,
        }

    def print(self, console: Console) -> None:
        """The table, where things are, and how to load the model."""
        if self.front is not None:
            console.print(front_terminal(self.front))
        console.print(terminal(self.table))
        lines = [f"Results and pictures: {self.folder}"]
        if self.mlflow_run is not None:
            lines.append(f"MLflow run {self.mlflow_run}: compare runs with `ffgym ui`")
        if self.saved is not None:
            line = load_line(self.saved.path, stock=self.saved.stock)
            lines += ["Load the pruned model with", f"  {line}"]
        if self.recovered is not None:
            again = load_line(self.recovered.saved.path, stock=self.recovered.saved.stock)
            lines += [*self.recovered.told, "Load it with", f"  {again}"]
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def run(config: RunConfig, *, progress: Console | None = None, resume: str | Path | None = None) -> RunResult:
    """Search, prune, calibrate, report and save, as the configuration says.

    Args:
        config: everything that decides the run.
        progress: where progress goes; stderr where left out.
        resume: folder of an interrupted run of this configuration to go on with, in the same MLflow run; it ends with
            the numbers that it would have ended with uninterrupted.

    Raises:
        FFGymError: what cannot be done, and what to do about it; the MLflow run is marked FAILED.
        KeyboardInterrupt: Ctrl-C; what was found so far is saved and printed, the MLflow run is marked KILLED.
    """
    say = Reporter(progress or Console(stderr=True))
    config = configured.resolve_agent(config)
    check_plugins(config)
    config = configured.with_options(config)
    agent = make_agent(config)
    folder = claim_folder(config) if resume is None else reopen_folder(Path(resume), config)
    earlier = Session() if resume is None else last_session(folder)
    tracking = config.tracking
    overwriting = resume is None and bool(contents(folder))
    with (
        held(folder),
        Tracker(
            tracking.folder, tracking.experiment, folder.name, tracking.enabled, resume=earlier.mlflow_run
        ) as tracker,
        disk_errors(),
        ExitStack() as stack,
    ):
        if resume is not None:
            if (folder / "report.json").is_file():
                say.say("the search of this run has ended; what comes after it is done again")
            remove_half_written(folder)
        elif not overwriting:
            stack.enter_context(removing_if_nothing_found(folder))
        session = Session(tracker.run_id or earlier.mlflow_run, earlier.dtype)
        text = to_toml(config, configured.meanings(config))
        tracker.log_config(config.model_dump(mode="json"), text)

        def begin() -> None:
            """From here on the folder is this run's."""
            write_text(folder / "config.toml", text)
            note_session(folder, session)
            stack.enter_context(saying_what_is_kept(folder, say.say))

        if not overwriting:
            begin()
        space = _open(config, earlier.dtype, folder if resume is not None else None, say)
        material = None
        if config.recover.method != "none":  # now, so that a corpus that will not do is known before the search
            material = gather(config, space.loaded, space.splits)
        if overwriting:  # not before: what cannot be loaded must not cost an earlier run its results
            clear_folder(folder)
            stack.enter_context(removing_if_nothing_found(folder))
            begin()
        note_session(folder, replace(session, dtype=space.loaded.dtype_name))
        table, main, saved, front = _find_and_save(space, agent, tracker, folder, say)
        recovered = None
        if material is not None and saved is not None:
            del space, agent  # the dense model and its factors: training needs the room
            recovered = _recover(config, saved, material, tracker, say)
            table = with_recovered(table, recovered, config)
            write_table(folder, table)
        tracker.log_table(as_dicts(table))
        for name in ("report.md", "units_kept.png", "reward.png"):
            tracker.log_artifact(folder / name)
        if front is not None:
            write_front(tracker, front, folder)
        return RunResult(table, main, folder, saved, tracker.run_id, front, recovered)


def _open(config: RunConfig, dtype: str | None, recorded: Path | None, say: Reporter) -> Workspace:
    """The run's workspace, as an earlier session had it.

    Args:
        config: the run.
        dtype: what ``auto`` came to then: now it may come to another.
        recorded: folder with what it measured: measured anew, the model may cost something else.
        say: where progress goes.
    """
    prior = [] if config.prior.name == "none" else [(config.prior.name, config.prior.options)]
    settled = config
    if dtype is not None and config.model.dtype == "auto":
        settled = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    rules = [*prior, *reference_rules(config).values()]
    return replace(open_workspace(settled, rules, say, recorded=recorded), config=config)


def _find_and_save(
    space: Workspace, agent: Agent, tracker: Tracker, folder: Path, say: Reporter
) -> tuple[ReportTable, Found, SavedModel | None, Front | None]:
    """Search, compare on the report split, save: the table, what was found at the main target, its model, the front."""
    config = space.config
    if config.prune.uniform and agent.searches:
        _say_how_many_shapes(space, say)
    give_prior(agent, space)
    tracker.set_tags(run_tags(space, agent))
    log_splits(tracker, space.splits)
    for resource, measurement in space.measurements.items():
        write_text(folder / f"{resource}.json", measurement.text)
        tracker.log_params({resource: {"digest": measurement.digest}})
        tracker.log_artifact(folder / f"{resource}.json")
    points = _search(space, agent, tracker, folder, say)
    main = next(found for found in points if found.target == config.main_target)
    histories: dict[str, Sequence[Episode]] = {config.agent.name: main.history}
    baseline = None
    if agent.searches and _has_random_baseline(config):
        baseline = _search_random(space, tracker, folder, say)
        histories["random"] = baseline.history
    at_main = at_target(space, config.main_target)
    references = reference_allocations(at_main, baseline, say)
    write_pictures(folder, space, {"found": main.best.allocation, **references}, histories)
    if main.pareto:
        write_pareto(folder, space, main, tracker, say)
    rows = compared_rows(at_main, references, main, say)
    table, saved = finish(at_main, rows, main, say, model_folder(config, folder, config.main_target))
    front = finish_front(space, points, table, folder, say) if config.prune.is_range else None
    write_table(folder, table)
    return table, main, saved, front


def check_plugins(config: RunConfig) -> None:
    """Create every plugin that the run names once, so that a wrong name or option fails before anything is loaded.

    Recovery is no plugin, and checked alike.

    Raises:
        ConfigError: an agent that cannot do what the run asks of it, see :func:`configured.check_agent_fits`.
    """
    configured.check_agent_fits(config)
    manager.create("criterion", config.criterion.name, config.criterion.options)
    make_reward(config)
    if config.prior.name != "none":
        manager.create("heuristic", config.prior.name, config.prior.options)
    if config.recover.method != "none":
        check_method(config.recover, config.model.name)


def _search(space: Workspace, agent: Agent, tracker: Tracker, folder: Path, say: Reporter) -> list[Found]:
    """The search, and what it came to: at the target, or at every point of the front."""
    config = space.config
    log = folder / "episodes.jsonl"
    try:
        found = _run_search(space, agent, tracker, log, say, config.agent.name, "search", config.targets)
    except SearchInterrupted as stop:
        write_found(folder, [stop.found], agent, space, tracker)
        raise
    write_found(folder, found, agent, space, tracker)
    return found


def _search_random(space: Workspace, tracker: Tracker, folder: Path, say: Reporter) -> Found:
    baseline, log = manager.create("agent", "random"), folder / "episodes-random.jsonl"
    search = space.config.search  # an agent with updates of its own size may have fewer episodes than one of these has
    size = min(search.episodes_per_update, search.episodes)
    config = space.config.model_copy(update={"search": search.model_copy(update={"episodes_per_update": size})})
    space = replace(space, config=config)
    (found,) = _run_search(space, baseline, tracker, log, say, "random", "random", space.config.targets)
    return found


def _run_search(
    space: Workspace,
    agent: Agent,
    tracker: Tracker,
    log: Path,
    say: Reporter,
    label: str,
    prefix: str,
    targets: Sequence[float],
) -> list[Found]:
    config = space.config
    budget = config.search.episodes * space.env.episode_windows * space.env.window_tokens
    if log.exists() and (earlier := len(read_episodes(log))):
        say.say(f"search: {label}: {earlier} episodes of earlier sessions are taken from {log.name}")
    with say.stage(f"search: {label}", budget) as stage:

        def on_episode(episode: Episode) -> None:
            stage.advance(episode.tokens, f"tokens, reward {episode.reward:.3f}")

        def on_update(episodes: Sequence[Episode], update: Update) -> None:
            tracker.log_episodes(episodes, update.diagnostics, search=prefix)

        def on_point(found: Found) -> None:
            stage.advance(0, f"tokens, finals at {found.target:.0%} done")

        return search_front(
            space.env,
            agent,
            config.search,
            make_schedule(config, space.env),
            targets,
            seed=config.seed,
            log=log,
            on_episode=on_episode,
            on_update=on_update,
            on_point=on_point,
        )


def _say_how_many_shapes(space: Workspace, say: Reporter) -> None:
    for target in space.config.targets:
        count = len(space.env.budget.shapes(target))
        many = f"{count} shapes use up the budget, and the finals measure them all"
        one = "one shape uses up the budget, so there is nothing to choose"
        where = f" at {target:.1%}" if space.config.prune.is_range else ""
        say.say(f"uniform{where}: {many if count > 1 else one}")


def _has_random_baseline(config: RunConfig) -> bool:
    """Whether random allocations are compared with, which follow no target of their own.

    Under one shape for all layers they could find nothing that the finals do not measure anyway.
    """
    wanted = config.search.random_baseline and config.agent.name != "random"
    return wanted and not config.prune.is_range and not config.prune.uniform


def _recover(config: RunConfig, saved: SavedModel, material: Material, tracker: Tracker, say: Reporter) -> Recovered:
    place = output_folder(saved.path)
    try:
        return train_and_save(
            config,
            saved.path,
            place,
            tracker,
            say,
            overwrite=True,  # what lies there is of an earlier session of this run, whose folder this is
            dense=config.model.name,
            material=material,
        )
    except KeyboardInterrupt:
        if unfinished_folder(place).exists() or not place.exists():
            say.say(f"the pruned model is in {saved.path}; go on with: ffgym recover {saved.path}")
        else:
            say.say(f"the pruned model is in {saved.path}, the trained one, complete, in {place}")
        raise
