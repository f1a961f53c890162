"""Who meets in the finals: what the policy recommends, the best episodes, the starts, and what must not be missed.

Candidates are distinct allocations at one target. Where all layers share one shape, every other shape joins them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ffgym.envs.pruning_env import PruningEnv
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import check_recommendations
from ffgym.types import Allocation, Episode

STARTS = ("prior", "given policy")  # origins of what a search started from


@dataclass(frozen=True, eq=False)  # no ==: its importance is an array
class Candidate:
    """An allocation, the importances behind it, and where it came from."""

    importance: np.ndarray  # shape (2L,), float32
    allocation: Allocation  # what the projection made of it, at the target
    origin: str  # "episode 37", "policy", "shape" for one that only the finals measured, or one of `STARTS`
    # nats per token on the deciding half of the finals' windows, or on all where all candidates are measured on all;
    # None for one that did not get there
    loss: float | None = None
    reward: float | None = None  # mean over these windows of what it earns; None as well
    # what the reward weighs, mean over these windows, by name; empty where it weighs nothing
    objectives: dict[str, float] = field(default_factory=dict)


def starting_points(env: PruningEnv, agent: Agent, target: float) -> list[Candidate]:
    """Where an agent starts, before it has searched: the prior, and what the policy recommends that it was given."""
    if not agent.searches:
        return []
    starts = [] if agent.prior_mean is None else [("prior", _prior(agent, agent.prior_mean, target))]
    if agent.policy_sublayers is not None:
        starts += [("given policy", importance) for importance in _recommended(env, agent, target)[:1]]
    return [Candidate(start, env.budget.project(start, target), origin) for origin, start in starts]


def _recommended(env: PruningEnv, agent: Agent, target: float) -> list[np.ndarray]:
    """Importances that the agent recommends now, each of shape (2L,), float32."""
    return check_recommendations(agent, np.array([target, 1.0], dtype=np.float32), len(env.budget.sublayers))


def _prior(agent: Agent, mean: np.ndarray, target: float) -> np.ndarray:
    """The prior, shape (2L,); under a range, on the line between its ends."""
    if agent.budgets is None or agent.prior_ends is None:
        return mean
    (low, high), (first, last) = agent.budgets, agent.prior_ends
    return np.asarray(first + (target - low) / (high - low) * (last - first), dtype=np.float32)


def contenders(
    env: PruningEnv,
    agent: Agent,
    history: Sequence[Episode],
    count: int,
    target: float,
    reach: float | None,
    starts: Sequence[Candidate],
) -> list[Candidate]:
    """Whatever meets in the finals at a target: the finalists, the starts, and every shared shape.

    The arguments are those of :func:`finalists`, and what :func:`starting_points` gave before the search.
    """
    candidates = finalists(env, agent, history, count, target, reach)
    first = candidates[0]
    for start in starts:
        if (first.origin, first.allocation.kept) != ("policy", start.allocation.kept):
            candidates = [c for c in candidates if c.allocation.kept != start.allocation.kept]
            candidates.append(start)
    if agent.searches:
        candidates = with_every_shape(env, candidates, target)
    return candidates


def finalists(
    env: PruningEnv, agent: Agent, history: Sequence[Episode], count: int, target: float, reach: float | None = None
) -> list[Candidate]:
    """What the agent recommends, then the episodes of the greatest reward; distinct allocations, at most ``count``.

    A reward compares with the dense model on the same text, so episodes of different text can be compared, if roughly.

    Args:
        env: projects importances at the target.
        agent: asked for its recommendations.
        history: at least one episode.
        count: how many are wanted, >= 1.
        target: the sparsity that they are for.
        reach: under a range of budgets, how far from the target the update of an episode may have been.
    """
    proposals = [(action, "policy") for action in _recommended(env, agent, target)]
    eligible = hardest(history if reach is None else near(history, target, reach))
    best_first = sorted(eligible, key=lambda episode: episode.reward, reverse=True)
    proposals += [(episode.action, f"episode {episode.index}") for episode in best_first]
    chosen: dict[tuple[int, ...], Candidate] = {}
    for importance, origin in proposals:
        allocation = env.budget.project(importance, target)
        chosen.setdefault(allocation.kept, Candidate(np.asarray(importance, np.float32), allocation, origin))
        if len(chosen) >= count:
            break
    return list(chosen.values())


def with_every_shape(env: PruningEnv, candidates: Sequence[Candidate], target: float) -> list[Candidate]:
    """The candidates, and where all layers share one shape, every other shape of the budget: there are only a few."""
    chosen = {candidate.allocation.kept: candidate for candidate in candidates}
    for allocation in env.budget.shapes(target):
        importance = env.budget.importance(allocation.kept)
        chosen.setdefault(allocation.kept, Candidate(importance, allocation, "shape"))
    return list(chosen.values())


def hardest(history: Sequence[Episode]) -> list[Episode]:
    """Episodes of the hardest stage reached."""
    stage = max((episode.target_sparsity, episode.fidelity) for episode in history)
    return [e for e in history if (e.target_sparsity, e.fidelity) == stage]


def near(history: Sequence[Episode], target: float, reach: float) -> list[Episode]:
    """Episodes whose own target was at most ``reach`` from this one; those of the nearest update where there are none.

    They are handed on as episodes of this target: an episode a little below or above it competes as an equal.
    """
    distances = [abs(episode.target_sparsity - target) for episode in history]
    within = max(reach + 1e-9, min(distances))
    return [replace(e, target_sparsity=target) for e, d in zip(history, distances, strict=True) if d <= within]
