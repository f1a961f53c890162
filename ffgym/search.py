"""One agent on one environment: the search, its log on disk, and the choice among finalists (DESIGN 3.4).

The search itself sees small, redrawn subsets, whose rewards must not be compared across updates. So what stood out
among its own update, and what the agent itself recommends, is measured again: at the target, at full fidelity, all on
the same larger part of the search split. The best of those is what was found. Under a range of budgets that is done for
every point of the front: what the policy recommends there, and what stood out near it, projected at that target.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ffgym.config import SearchTable
from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import DataError, PluginError
from ffgym.evaluation.perplexity import evaluate
from ffgym.pareto import non_dominated, thinned
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import called, check_recommendations, check_update
from ffgym.plugins.manager import described
from ffgym.types import Allocation, Episode, Update

FINALS_SEED = 7_919  # finalists meet on windows of their own draw, the same for every agent of one seed


@dataclass(frozen=True)
class Candidate:
    """An allocation, the importances behind it, and where it came from.

    Attributes:
        importance: shape (2L,), float32.
        allocation: what the projection made of it, at the target.
        origin: ``"episode 37"``, ``"policy"``, or ``"shape"`` for one that only the finals measured.
        loss: nats per token on the finals' windows; ``None`` before they were run.
        reward: what it earns there; ``None`` before.
        objectives: what the reward weighs, measured there, by name; empty before, and where it weighs nothing.
    """

    importance: np.ndarray
    allocation: Allocation
    origin: str
    loss: float | None = None
    reward: float | None = None
    objectives: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the chosen candidate.
        finalists: all that were measured again, best first.
        dense_loss: dense loss on the finals' windows; ``None`` where they were not run.
        history: every episode.
        search_tokens: tokens that the agent's episodes took.
        final_tokens: tokens that the finals took.
        seconds: wall time of search and finals, that of earlier sessions of a search that was interrupted included.
        target: the sparsity that it was searched at, or that this point of a front is for.
    """

    best: Candidate
    finalists: tuple[Candidate, ...]
    dense_loss: float | None
    history: tuple[Episode, ...]
    search_tokens: int
    final_tokens: int
    seconds: float
    target: float

    @property
    def pareto(self) -> tuple[Candidate, ...]:
        """Finalists that no other one beats in every objective; empty where the reward has less than two."""
        measured = [c for c in self.finalists if len(c.objectives) > 1]
        if not measured:
            return ()
        keep = non_dominated(np.array([list(c.objectives.values()) for c in measured]))
        return tuple(c for c, kept in zip(measured, keep, strict=True) if kept)


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a search that has finished at least one episode.

    Attributes:
        found: the best so far: what the agent recommends, or else the episode that stood out most in its own update;
            no finals were run. Under a range, at the environment's own target.
    """

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found


def search(
    env: PruningEnv,
    agent: Agent,
    settings: SearchTable,
    schedule: Schedule,
    *,
    seed: int,
    log: Path | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    on_update: Callable[[Sequence[Episode], Update], None] | None = None,
) -> Found:
    """Let the agent spend its tokens, then choose: :func:`search_front` for the environment's own target alone."""
    (found,) = search_front(
        env,
        agent,
        settings,
        schedule,
        [env.sparsity],
        seed=seed,
        log=log,
        on_episode=on_episode,
        on_update=on_update,
    )
    return found


def search_front(
    env: PruningEnv,
    agent: Agent,
    settings: SearchTable,
    schedule: Schedule,
    targets: Sequence[float],
    *,
    seed: int,
    log: Path | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    on_update: Callable[[Sequence[Episode], Update], None] | None = None,
    on_point: Callable[[Found], None] | None = None,
) -> list[Found]:
    """Let the agent spend its tokens, then choose at every target.

    Args:
        env: the stationary task.
        agent: who searches.
        settings: episodes, finalists and their tokens.
        schedule: ramps, or the range that the updates' targets are drawn from.
        targets: the points of the front, rising; one for a search at a single target.
        seed: of the agent and of the subsets: same seed, same search, bit for bit at equal thread count.
        log: JSONL file of episodes. What it holds already is replayed instead of measured, so that an interrupted
            search goes on where it stopped.
        on_episode: called after each episode.
        on_update: called after each update with its episodes and what the agent said.
        on_point: called after the finals of each target.

    Returns:
        one for every target; they share the history, and each has its own finals.

    Raises:
        SearchInterrupted: Ctrl-C after at least one episode.
        DataError: the log belongs to another search.
    """
    earlier = read_log(log) if log is not None and log.exists() else Log((), 0.0)
    clock = _Clock(earlier.seconds)
    writer = log.open("a", encoding="utf-8") if log is not None else None

    def record(episode: Episode) -> None:
        if episode.index < len(earlier.episodes):
            clock.lap()  # what a replay takes is no part of the search
        else:
            seconds = clock.count()
            if writer is not None:
                writer.write(json.dumps({**episode_to_json(episode), "seconds": round(seconds, 3)}) + "\n")
                writer.flush()
        if on_episode is not None:
            on_episode(episode)

    vector = PruningVectorEnv(
        env,
        schedule,
        num_envs=agent.update_size(settings.episodes_per_update),
        token_budget=settings.episodes * env.episode_windows * env.window_tokens,
        stop_margin=settings.stop_margin if settings.stop_hopeless else None,
        slope_episodes=agent.slope_episodes,
        on_episode=record,
        replay=earlier.episodes,
        log_name=str(log),
    )

    told = 0

    def report(update: Update) -> None:
        nonlocal told
        new, told = vector.history[told:], len(vector.history)
        if on_update is not None:
            on_update(new, update)

    def found(target: float, ranked: Sequence[Candidate], dense_loss: float | None, tokens: int) -> Found:
        return Found(
            best=ranked[0],
            finalists=tuple(ranked),
            dense_loss=dense_loss,
            history=tuple(vector.history),
            search_tokens=vector.tokens_spent,
            final_tokens=tokens,
            seconds=clock.total,
            target=target,
        )

    points: list[Found] = []
    try:
        _learn(agent, vector, seed, report)
        reach = _reach(targets)
        for target in targets:
            candidates = finalists(env, agent, vector.history, settings.finalists, target=target, reach=reach)
            if reach is None:  # over a range, the front over sparsity is what is traded off
                candidates = with_pareto(env, vector.history, candidates)
            if agent.searches:
                candidates = with_every_shape(env, candidates, target)
            measured, dense_loss, tokens = run_finals(env, candidates, settings.final_tokens, seed)
            clock.count()
            points.append(found(target, measured, dense_loss, tokens))
            if on_point is not None:
                on_point(points[-1])
    except KeyboardInterrupt:
        if not vector.history or len(vector.history) < len(earlier.episodes):  # an earlier session handed over more
            raise
        clock.count()
        best = finalists(env, agent, vector.history, 1, reach=_reach(targets))
        raise SearchInterrupted(found(env.sparsity, best, None, 0)) from None
    finally:
        if writer is not None:
            writer.close()
    return points


def _learn(agent: Agent, vector: PruningVectorEnv, seed: int, on_update: Callable[[Update], None]) -> None:
    """Let the agent search; what it raises by itself is a `PluginError`, what measuring or telling raises stays.

    Raises:
        PluginError: it broke, took no step, or did not tell of its updates.
    """
    telling, told = False, 0
    foreign: list[Exception] = []

    def tell(update: Update) -> None:
        nonlocal telling, told
        check_update(agent, update)
        telling = True
        on_update(update)
        telling = False
        told += 1

    def learn() -> None:
        try:
            agent.learn(vector, seed=seed, on_update=tell)
        except Exception as error:
            if not (vector.measuring or telling):
                raise
            foreign.append(error)

    called(agent, learn, "searching")
    if foreign:
        raise foreign[0]
    if not vector.history:
        raise PluginError(f"{described(agent)}: learn came back without a step", hint="Call env.step in learn.")
    if told == 0:
        raise PluginError(
            f"{described(agent)}: learn never called on_update, so nobody was told of its episodes",
            hint="Call on_update(ffgym.Update(index, rewards)) after every step, index from 0.",
        )


class _Clock:
    """Wall time of a search over all its sessions."""

    def __init__(self, total: float) -> None:
        self.total = total
        self._since = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call, counted nowhere."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return seconds

    def count(self) -> float:
        """Seconds since the last call, added to the total."""
        seconds = self.lap()
        self.total += seconds
        return seconds


def _reach(targets: Sequence[float]) -> float | None:
    """How far from its target an episode may stand for a point of a front: half the way to the next point."""
    return None if len(targets) == 1 else float(np.diff(targets).max()) / 2


def finalists(
    env: PruningEnv,
    agent: Agent,
    history: Sequence[Episode],
    count: int,
    *,
    target: float | None = None,
    reach: float | None = None,
) -> list[Candidate]:
    """What the agent recommends, then what stood out most in its own update; distinct allocations, at most ``count``.

    Where every update is a single episode nothing can stand out: each was measured on other text. Then what the agent
    recommends is all, unless it recommends nothing.

    Args:
        env: projects importances at the target.
        agent: asked for its recommendations.
        history: at least one episode.
        count: how many are wanted, >= 1.
        target: the sparsity that they are for; the environment's own where left out.
        reach: under a range of budgets, how far from the target the update of an episode may have been.
    """
    target = env.sparsity if target is None else target
    observation = np.array([target, 1.0], dtype=np.float32)
    proposals = [(action, "policy") for action in check_recommendations(agent, observation, len(env.budget.sublayers))]
    standing = by_standing(history) if reach is None else by_standing(near(history, target, reach))
    if not proposals or len({episode.update for episode in history}) < len(history):
        proposals += [(episode.action, f"episode {episode.index}") for episode in standing]
    chosen: dict[tuple[int, ...], Candidate] = {}
    for importance, origin in proposals:
        allocation = env.budget.project(importance, target)
        chosen.setdefault(allocation.kept, Candidate(np.asarray(importance, np.float32), allocation, origin))
        if len(chosen) >= count:
            break
    return list(chosen.values())


def with_every_shape(env: PruningEnv, candidates: Sequence[Candidate], target: float | None = None) -> list[Candidate]:
    """The candidates, and where all layers share one shape, every other shape of the budget: there are only a few."""
    chosen = {candidate.allocation.kept: candidate for candidate in candidates}
    for allocation in env.budget.shapes(env.sparsity if target is None else target):
        importance = env.budget.importance(allocation.kept)
        chosen.setdefault(allocation.kept, Candidate(importance, allocation, "shape"))
    return list(chosen.values())


def hardest(history: Sequence[Episode]) -> list[Episode]:
    """Episodes of the hardest stage reached."""
    stage = max((episode.target_sparsity, episode.fidelity) for episode in history)
    return [e for e in history if (e.target_sparsity, e.fidelity) == stage]


def near(history: Sequence[Episode], target: float, reach: float) -> list[Episode]:
    """Episodes whose own target was at most ``reach`` from this one; those of the nearest update where there are none.

    They are handed on as episodes of this target: what stood out a little below or above it competes as an equal.
    """
    distances = [abs(episode.target_sparsity - target) for episode in history]
    within = max(reach + 1e-9, min(distances))
    return [replace(e, target_sparsity=target) for e, d in zip(history, distances, strict=True) if d <= within]


def by_standing(history: Sequence[Episode]) -> list[Episode]:
    """Episodes of the hardest stage reached, by reward relative to the mean of their own update, best first."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for episode in history:
        rewards[episode.update].append(episode.reward)
    eligible = hardest(history)
    overall = float(np.mean([episode.reward for episode in eligible]))

    def standing(episode: Episode) -> float:
        own = rewards[episode.update]
        return episode.reward - (float(np.mean(own)) if len(own) > 1 else overall)

    return sorted(eligible, key=standing, reverse=True)


def with_pareto(env: PruningEnv, history: Sequence[Episode], chosen: Sequence[Candidate]) -> list[Candidate]:
    """The finalists, then allocations that none of the hardest stage beats in every objective, spread over that set.

    Args:
        env: its reward says how many to add at most.
        history: at least one episode.
        chosen: the finalists.
    """
    standings = objective_standings(history)
    if not standings:
        return list(chosen)
    seated = {candidate.allocation.kept for candidate in chosen}
    added: dict[tuple[int, ...], tuple[Candidate, np.ndarray]] = {}
    winners = non_dominated(np.array([point for _, point in standings]))
    for (episode, point), wins in zip(standings, winners, strict=True):
        allocation = env.budget.project(episode.action, env.sparsity)
        if wins and allocation.kept not in seated:
            added[allocation.kept] = Candidate(episode.action, allocation, f"episode {episode.index}"), point
    candidates = [candidate for candidate, _ in added.values()]
    kept = thinned(np.array([point for _, point in added.values()]), env.reward.pareto)
    return [*chosen, *(candidates[index] for index in kept)]


def objective_standings(history: Sequence[Episode]) -> list[tuple[Episode, np.ndarray]]:
    """Each allocation of the hardest stage: its first episode, and its objectives relative to its own updates.

    Different updates are measured on different tokens. So objectives are taken relative to the mean of their update, as
    rewards are in `by_standing`, and an allocation that came up more than once counts with the mean.

    Returns:
        nothing where the reward has less than two objectives; points have shape (objectives,).
    """
    eligible = [e for e in hardest(history) if len(e.objectives) > 1]
    vectors = {e.index: np.array(list(e.objectives.values())) for e in eligible}
    updates: dict[int, list[np.ndarray]] = defaultdict(list)
    for episode in eligible:
        updates[episode.update].append(vectors[episode.index])
    found: dict[tuple[int, ...], tuple[Episode, list[np.ndarray]]] = {}
    for episode in eligible:
        own = updates[episode.update]
        reference = np.mean(own if len(own) > 1 else list(vectors.values()), axis=0)
        found.setdefault(episode.kept, (episode, []))[1].append(vectors[episode.index] - reference)
    return [(episode, np.mean(points, axis=0)) for episode, points in found.values()]


def run_finals(
    env: PruningEnv, candidates: Sequence[Candidate], tokens: int, seed: int
) -> tuple[list[Candidate], float | None, int]:
    """Measure candidates on the same windows and examples; best reward first, with the dense loss and tokens taken.

    A single candidate is chosen without being measured.
    """
    if len(candidates) == 1:
        return list(candidates), None, 0
    subset, examples = finals_windows(env, tokens, seed), finals_examples(env, tokens, seed)
    measured: list[tuple[float, float, Candidate]] = []
    for candidate in candidates:
        found = env.judge(candidate.allocation, subset, examples)
        loss = found.pruned.loss
        known = replace(candidate, loss=loss, reward=found.reward, objectives=found.objectives)
        measured.append((-found.reward, np.inf if found.failed else loss, known))
    # Where losses are so large that rewards are equal, the smaller loss; what broke down comes last.
    measured.sort(key=lambda each: each[:2])
    return [c for _, _, c in measured], env.dense(subset, examples).loss, len(candidates) * env.tokens(subset, examples)


def finals_windows(env: PruningEnv, tokens: int, seed: int) -> tuple[int, ...]:
    """Indices of the search windows that finalists, and later final refits, are compared on."""
    windows = min(len(env.windows), max(1, tokens // env.window_tokens))
    return env.draw(np.random.default_rng([FINALS_SEED, seed]), windows)


def finals_examples(env: PruningEnv, tokens: int, seed: int) -> tuple[int, ...]:
    """Indices of the task examples that finalists are compared on: as many to a window as an episode has."""
    return env.draw_examples(np.random.default_rng([FINALS_SEED, seed, 1]), len(finals_windows(env, tokens, seed)))


def finals_loss(env: PruningEnv, tokens: int, seed: int) -> float:
    """Loss of the model as it is cut now on the finals' windows, nats per token."""
    windows = env.windows[list(finals_windows(env, tokens, seed))]
    return evaluate(env.prunable.model, windows, tokens_per_batch=env.tokens_per_batch).loss


def episode_to_json(episode: Episode) -> dict[str, Any]:
    """One line of the log; float32 importances survive the round trip bit for bit."""
    return {**asdict(episode), "action": [float(a) for a in episode.action]}


@dataclass(frozen=True)
class Log:
    """What the log of a search holds.

    Attributes:
        episodes: in order.
        seconds: wall time that they took, over all sessions.
    """

    episodes: tuple[Episode, ...]
    seconds: float


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a log, see :func:`read_log`."""
    return list(read_log(path).episodes)


def read_log(path: Path) -> Log:
    """Read a log; a last line that was cut off by a crash is left out.

    Raises:
        DataError: any other line that is not an episode, or a file that is not UTF-8.
    """
    episodes: list[Episode] = []
    seconds = 0.0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        lines = content[:whole].decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no log: {error}", hint="Delete the file to search from the start.") from None
    if whole < len(content):
        os.truncate(path, whole)  # or the next line would be glued to it
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            seconds += float(row.pop("seconds", 0.0))
            row["action"] = np.array(row["action"], dtype=np.float32)
            row["kept"] = tuple(row["kept"])
            row["slopes"] = tuple(row.get("slopes", ()))
            episodes.append(Episode(**row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is not an episode: {error}", hint="Delete the file to search from the start."
            ) from error
    return Log(tuple(episodes), seconds)
