"""The stages of a run: what ``ffgym run`` does, on one page.

model, data -> statistics -> order -> refits -> search -> final calibration -> report -> saved model -> MLflow
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ffgym.config.tables import RunConfig
from ffgym.errors import ModelError
from ffgym.files import check_room
from ffgym.models.loading import check_weights
from ffgym.models.modes import own_modes
from ffgym.models.origin import absolute_name
from ffgym.pipeline.agent import make_agent
from ffgym.pipeline.artifacts import allocation_json, tracked_result, write_front, write_pictures, write_table
from ffgym.pipeline.compare import asked_rules, compared_rows, heuristic_allocations, target_model_folder, with_result
from ffgym.pipeline.folder import read_record
from ffgym.pipeline.front import finish_front
from ffgym.pipeline.plan import follows_slopes, plan_run, planned_steps
from ffgym.pipeline.result import RunResult, finished_run
from ffgym.pipeline.search import Searched, search
from ffgym.pipeline.session import Session
from ffgym.pipeline.start import check_inputs
from ffgym.pipeline.task import Task, at_target, open_task
from ffgym.pipeline.training import train
from ffgym.plan import counts
from ffgym.plan.plan import Plan
from ffgym.prepare.configured import namesakes
from ffgym.prepare.store import check_store_folder
from ffgym.prepare.workers import cluster_of, report_idle_workers
from ffgym.recover.text import gather
from ffgym.report.progress import Reporter
from ffgym.report.table import Row

if TYPE_CHECKING:
    from ffgym.execute.ray import Cluster


@own_modes()
def run_stages(config: RunConfig, progress: Console | None, resumed: Path | None) -> RunResult:
    """The stages of a run, see :func:`ffgym.pipeline.start.run`.

    Args:
        config: settled.
        resumed: folder of the earlier sessions, reopened; ``None`` for a new run.
    """
    reporter = Reporter(progress)
    for line in namesakes(config):
        reporter.print(line)
    if resumed is not None and (finished := finished_run(resumed, config)):
        reporter.print(f"the run in {finished.folder} is finished: there is nothing left to do")
        return finished
    if resumed is not None and (place := read_record(resumed).dense) and not absolute_name(config.model.name):
        raise ModelError(  # the hub may have another model of that name
            f"model.name = {config.model.name!r} leads nowhere from here; it was {place} where the run began",
            hint="Continue the run in the directory where you started it.",
        )
    check_inputs(config, is_resumed=resumed is not None)
    agent = make_agent(config)
    plan = plan_run(config, agent)  # first: a model that does not exist must leave no folder and no MLflow run
    check_weights(config.model.name)
    check_store_folder()
    reporter.print(plan.summary)
    plan.check()
    with (
        cluster_of(config.workers, config.model.device, reporter.print) as cluster,
        Session.open(config, reporter, resumed) as session,
    ):
        reporter.plan(planned_steps(config, plan))
        report_idle_workers(
            agent.update_size(config.search.episodes_per_update),
            config.workers.count,
            reporter.print,
            config.episode_windows if follows_slopes(config, agent, plan.shape) else None,
        )
        task = prepare(config, session, plan, cluster)
        # Before the search, so that an unfit corpus is refused early.
        text = None if config.recover.method == "none" else gather(config, task.loaded, task.splits)
        hint = "Free some space, name a folder on a larger disk (--output), or set output.save_model to false."
        check_room(session.folder, counts.saved_models(plan.shape, plan.load), "the saved model", hint)
        session.begin_search(task)
        searched = search(task, agent, session)
        rows = compare(task, searched, session)
        result = finish(task, searched, rows, session)
        del task, agent  # frees the dense model and its factors: training needs the memory
        return train(result, searched.main, text, session)


def prepare(config: RunConfig, session: Session, plan: Plan, cluster: Cluster | None = None) -> Task:
    """Model, splits, pruning paths, budget and environment, with what the plan and an earlier session settled."""
    chosen = session.place.record.dtype or config.model.dtype  # auto might choose another one now
    placed = config.model_copy(update={"model": config.model.model_copy(update={"dtype": chosen})})
    recorded = session.folder if session.place.resumed else None
    task = open_task(placed, asked_rules(config), session.progress, plan=plan, recorded=recorded, cluster=cluster)
    return replace(task, config=config)


def compare(task: Task, searched: Searched, session: Session) -> list[Row]:
    """Measure the dense model, the references and the plainly cut model on the report split, and draw the pictures."""
    main, baseline, progress = searched.main, searched.baseline, session.progress
    at_main = at_target(task, main.target)
    heuristics, random, searches = heuristic_allocations(at_main), {}, {task.config.agent.name: main}
    if baseline is not None:
        where = "at random" if task.config.prior.name == "none" else "near the prior"
        random = {f"best of {len(baseline.history)} {where}": baseline.best.allocation}
        searches["random"] = baseline
    allocations = {"found": main.best.allocation, **heuristics, **random}
    write_pictures(session.folder, task, allocations, searches)
    return compared_rows(at_main, heuristics, random, main, progress)


def finish(task: Task, searched: Searched, rows: list[Row], session: Session) -> RunResult:
    """Measure and save the refitted result, and under a range measure the whole front."""
    config, main, folder = task.config, searched.main, session.folder
    place = target_model_folder(config, folder, main.target)
    table, saved = with_result(at_target(task, main.target), rows, main, session.progress, place)
    front = None
    if config.prune.is_range:
        front = finish_front(task, searched.points, table, folder, session.progress)
        write_front(session.tracker, front, searched.points, config, folder)
    write_table(folder, table)
    session.tracker.log_result(tracked_result(table.saved, table.dense, main))
    if saved is not None:
        session.tracker.log_model(saved.path)
    return RunResult(table, allocation_json(main), folder, saved, session.tracker.run_id, front, found=main)
