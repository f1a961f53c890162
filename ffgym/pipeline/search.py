"""The search stage of a run: the agent's search, and random allocations for as many tokens to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ffgym.config.tables import RunConfig
from ffgym.files import write_text
from ffgym.pipeline.artifacts import log_splits, run_tags, write_found
from ffgym.pipeline.session import Session
from ffgym.pipeline.task import Task, give_prior
from ffgym.plugins import manager
from ffgym.plugins.bases import Agent
from ffgym.prepare.configured import schedule_of
from ffgym.report.layout import percent
from ffgym.report.progress import Reporter
from ffgym.search.finals import expected_tokens, finals_examples, finals_windows
from ffgym.search.log import count_episodes
from ffgym.search.loop import SearchInterrupted, SearchResult, search_front
from ffgym.tracking.tracker import Tracker
from ffgym.types import Episode, Update, do_nothing

NEAR_PRIOR = 0.15  # spread of the random allocations that a search is compared with: they start where it starts


@dataclass(frozen=True)
class Searched:
    """The results of the searches of a run."""

    points: tuple[SearchResult, ...]  # the agent's, one at every target, rising
    main: SearchResult
    baseline: SearchResult | None  # the best of random allocations; None where none were measured


def search(task: Task, agent: Agent, session: Session) -> Searched:
    """Let the agent search, then measure random allocations for as many tokens, where the run compares with them."""
    config, tracker, folder = task.config, session.tracker, session.folder
    give_prior(agent, task)
    tracker.set_tags(run_tags(task))
    log_splits(tracker, task.splits)
    for resource, measurement in task.measurements.items():
        write_text(folder / f"{resource}.json", measurement.text)
        tracker.log_params({f"{resource}.digest": measurement.digest})
        tracker.log_artifact(folder / f"{resource}.json")
    try:
        log, label = folder / "episodes.jsonl", f"search: {config.agent.name}"
        points = tracked_search(task, agent, session.progress, tracker, label, log)
    except SearchInterrupted as stop:
        write_found(folder, stop.found, [], agent, task, tracker)
        raise
    main = next(found for found in points if found.target == config.main_target)
    write_found(folder, main, points, agent, task, tracker)
    baseline = _random_baseline(task, session) if agent.searches and compares_with_random(config) else None
    return Searched(tuple(points), main, baseline)


def _random_baseline(task: Task, session: Session) -> SearchResult:
    search = task.config.search  # an agent that sets its own update size may run fewer episodes than one of these
    size = min(search.episodes_per_update, search.episodes)
    config = task.config.model_copy(update={"search": search.model_copy(update={"episodes_per_update": size})})
    near = {} if config.prior.name == "none" else {"spread": NEAR_PRIOR}
    agent: Agent = manager.create("agent", "random", near)
    give_prior(agent, task)
    log = session.folder / "episodes-random.jsonl"
    (found,) = tracked_search(
        replace(task, config=config), agent, session.progress, session.tracker, "search: random", log, "search/random"
    )
    return found


def tracked_search(
    task: Task,
    agent: Agent,
    progress: Reporter,
    tracker: Tracker,
    label: str,
    log: Path,
    prefix: str = "search",
    *,
    on_update: Callable[[Sequence[Episode]], None] = do_nothing,
) -> list[SearchResult]:
    """Search at the targets of a task's configuration, with progress, a log and metrics.

    Args:
        label: of the stage that progress shows.
        log: of the episodes; what it holds is not measured again.
        prefix: what MLflow's names of the metrics begin with.
        on_update: called with the episodes of each update.
    """
    config, env = task.config, task.env
    finals = 0
    if agent.searches:
        own = env.tokens(finals_windows(env, config.seed), finals_examples(env, config.seed))
        finals = expected_tokens(config.search.finalists, own, agent.recommendations, env.reserved)
    earlier = count_episodes(log) if log.exists() else 0
    if earlier:
        progress.print(f"{label}: {earlier} episodes of earlier sessions are read from {log.name}")
    total = config.search.episodes * env.episode_tokens + finals * len(config.targets)
    with progress.stage(label, total, "tokens") as stage:

        def episode_done(episode: Episode) -> None:
            stage.advance(episode.tokens, f"reward {episode.reward:.3f}", is_known=episode.index < earlier)
            tracker.log_episode(episode, search=prefix)

        def update_done(episodes: Sequence[Episode], update: Update) -> None:
            on_update(episodes)
            tracker.log_update(update, episodes[-1].index, search=prefix)

        return search_front(
            env,
            agent,
            schedule_of(config),
            config.targets,
            episodes=config.search.episodes,
            episodes_per_update=config.search.episodes_per_update,
            finalist_count=config.search.finalists,
            seed=config.seed,
            log=log,
            on_episode=episode_done,
            on_update=update_done,
            on_point=lambda found: stage.advance(finals, f"finals at {percent(found.target)} done"),
            on_progress=stage.partly,
            on_finals=lambda share: stage.partly(share * finals),
        )


def compares_with_random(config: RunConfig) -> bool:
    """Whether random allocations are compared with, which follow no target of their own.

    Under one shape for all layers they could find nothing that the finals do not measure anyway.
    """
    wanted = config.search.random_baseline and config.agent.name != "random"
    return wanted and not config.prune.is_range and not config.prune.uniform
