"""One agent on one environment: the search, its log on disk, and the choice among finalists (DESIGN 3.4).

The search itself sees small, redrawn subsets, whose rewards must not be compared across updates. So what stood out
among its own update, and what the agent itself recommends, is measured again: at the target, at full fidelity, all on
the same larger part of the search split. The best of those is what was found.
"""

from __future__ import annotations

import json
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
from ffgym.errors import DataError
from ffgym.evaluation.perplexity import evaluate
from ffgym.pareto import non_dominated, thinned
from ffgym.plugins.bases import Agent
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
        seconds: wall time of search and finals.
    """

    best: Candidate
    finalists: tuple[Candidate, ...]
    dense_loss: float | None
    history: tuple[Episode, ...]
    search_tokens: int
    final_tokens: int
    seconds: float

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
            no finals were run.
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
    """Let the agent spend its tokens, then choose.

    Args:
        env: the stationary task.
        agent: who searches.
        settings: episodes, finalists and their tokens.
        schedule: ramps.
        seed: of the agent and of the subsets: same seed, same search, bit for bit at equal thread count.
        log: JSONL file of episodes. What it holds already is replayed instead of measured, so that an interrupted
            search goes on where it stopped.
        on_episode: called after each episode.
        on_update: called after each update with its episodes and what the agent said.

    Raises:
        SearchInterrupted: Ctrl-C after at least one episode.
        DataError: the log belongs to another search.
    """
    begun = time.monotonic()
    replay = read_episodes(log) if log is not None and log.exists() else []
    writer = log.open("a", encoding="utf-8") if log is not None else None

    def record(episode: Episode) -> None:
        if writer is not None and episode.index >= len(replay):
            writer.write(json.dumps(episode_to_json(episode)) + "\n")
            writer.flush()
        if on_episode is not None:
            on_episode(episode)

    vector = PruningVectorEnv(
        env,
        schedule,
        num_envs=settings.episodes_per_update,
        token_budget=settings.episodes * env.episode_windows * env.window_tokens,
        on_episode=record,
        replay=replay,
    )

    def report(update: Update) -> None:
        if on_update is not None:
            on_update([e for e in vector.history if e.update == update.index], update)

    try:
        agent.learn(vector, seed=seed, on_update=report)
        candidates = with_pareto(env, vector.history, finalists(env, agent, vector.history, settings.finalists))
        if agent.searches:
            candidates = with_every_shape(env, candidates)
        measured, dense_loss, tokens = run_finals(env, candidates, settings.final_tokens, seed)
    except KeyboardInterrupt:
        if not vector.history:
            raise
        best = finalists(env, agent, vector.history, 1)[0]
        history = tuple(vector.history)
        spent = vector.tokens_spent
        raise SearchInterrupted(Found(best, (best,), None, history, spent, 0, time.monotonic() - begun)) from None
    finally:
        if writer is not None:
            writer.close()
    return Found(
        best=measured[0],
        finalists=tuple(measured),
        dense_loss=dense_loss,
        history=tuple(vector.history),
        search_tokens=vector.tokens_spent,
        final_tokens=tokens,
        seconds=time.monotonic() - begun,
    )


def finalists(env: PruningEnv, agent: Agent, history: Sequence[Episode], count: int) -> list[Candidate]:
    """What the agent recommends, then what stood out most in its own update; distinct allocations, at most ``count``.

    Args:
        env: projects importances at the target.
        agent: asked for its recommendations.
        history: at least one episode.
        count: how many are wanted, >= 1.
    """
    observation = np.array([env.sparsity, 1.0], dtype=np.float32)
    proposals = [(action, "policy") for action in agent.recommend(observation)]
    proposals += [(episode.action, f"episode {episode.index}") for episode in by_standing(history)]
    chosen: dict[tuple[int, ...], Candidate] = {}
    for importance, origin in proposals:
        allocation = env.budget.project(importance, env.sparsity)
        chosen.setdefault(allocation.kept, Candidate(np.asarray(importance, np.float32), allocation, origin))
        if len(chosen) >= count:
            break
    return list(chosen.values())


def with_every_shape(env: PruningEnv, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, and where all layers share one shape, every other shape of the budget: there are only a few."""
    chosen = {candidate.allocation.kept: candidate for candidate in candidates}
    for allocation in env.budget.shapes(env.sparsity):
        importance = env.budget.importance(allocation.kept)
        chosen.setdefault(allocation.kept, Candidate(importance, allocation, "shape"))
    return list(chosen.values())


def hardest(history: Sequence[Episode]) -> list[Episode]:
    """Episodes of the hardest stage reached."""
    stage = max((episode.target_sparsity, episode.fidelity) for episode in history)
    return [e for e in history if (e.target_sparsity, e.fidelity) == stage]


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


def read_episodes(path: Path) -> list[Episode]:
    """Read a log; a last line that was cut off by a crash is left out.

    Raises:
        DataError: any other line that is not an episode.
    """
    episodes: list[Episode] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")  # or the next line would be glued to it
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["action"] = np.array(row["action"], dtype=np.float32)
            row["kept"] = tuple(row["kept"])
            episodes.append(Episode(**row))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}, line {number} is not an episode: {error}", hint="Delete the file to search from the start."
            ) from error
    return episodes
