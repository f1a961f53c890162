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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ffgym.config import SearchTable
from ffgym.envs.pruning_env import PruningEnv
from ffgym.envs.schedule import Schedule
from ffgym.envs.vector import PruningVectorEnv
from ffgym.errors import DataError
from ffgym.evaluation.perplexity import evaluate
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
    """

    importance: np.ndarray
    allocation: Allocation
    origin: str
    loss: float | None = None


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
        candidates = finalists(env, agent, vector.history, settings.finalists)
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


def by_standing(history: Sequence[Episode]) -> list[Episode]:
    """Episodes of the hardest stage reached, by reward relative to the mean of their own update, best first."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for episode in history:
        rewards[episode.update].append(episode.reward)
    hardest = max((episode.target_sparsity, episode.fidelity) for episode in history)
    eligible = [e for e in history if (e.target_sparsity, e.fidelity) == hardest]
    overall = float(np.mean([episode.reward for episode in eligible]))

    def standing(episode: Episode) -> float:
        own = rewards[episode.update]
        return episode.reward - (float(np.mean(own)) if len(own) > 1 else overall)

    return sorted(eligible, key=standing, reverse=True)


def run_finals(
    env: PruningEnv, candidates: Sequence[Candidate], tokens: int, seed: int
) -> tuple[list[Candidate], float | None, int]:
    """Measure candidates on the same windows of the search split; best first, with the dense loss and tokens taken.

    A single candidate is chosen without being measured.
    """
    if len(candidates) == 1:
        return list(candidates), None, 0
    subset = finals_windows(env, tokens, seed)
    measured = [replace(c, loss=env.measure(c.allocation, subset).loss) for c in candidates]
    measured.sort(key=lambda c: c.loss if c.loss is not None and np.isfinite(c.loss) else np.inf)
    return measured, env.dense(subset).loss, len(candidates) * len(subset) * env.window_tokens


def finals_windows(env: PruningEnv, tokens: int, seed: int) -> tuple[int, ...]:
    """Indices of the search windows that finalists, and later final refits, are compared on."""
    windows = min(len(env.windows), max(1, tokens // env.window_tokens))
    return env.draw(np.random.default_rng([FINALS_SEED, seed]), windows)


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
