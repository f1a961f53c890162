"""The finals: the best candidates of a search are measured again on equal terms, and one is chosen.

The search itself sees small, redrawn subsets, whose rewards must not be compared across updates. So what stood out
among its own update, and what the agent itself recommends, is measured again: at the target, at full fidelity, all on
the same larger part of the search split. The best of those is what was found. Under a range of budgets that is done for
every point of the front: what the policy recommends there, and what stood out near it, projected at that target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ffgym.envs.pruning_env import PruningEnv, Trial
from ffgym.evaluation.evaluator import OnProgress
from ffgym.evaluation.perplexity import evaluate_cut
from ffgym.plugins.bases import Agent
from ffgym.plugins.contracts import check_recommendations
from ffgym.search.pareto import non_dominated, thinned
from ffgym.types import Allocation, Episode

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


def contenders(
    env: PruningEnv, agent: Agent, history: Sequence[Episode], count: int, target: float, reach: float | None
) -> list[Candidate]:
    """Whatever meets in the finals at a target: the finalists, and what must not be missed beside them.

    The arguments are those of :func:`finalists`.
    """
    candidates = finalists(env, agent, history, count, target=target, reach=reach)
    if reach is None:  # over a range, the front over sparsity is what is traded off
        candidates = with_pareto(env, history, candidates)
    if agent.searches:
        candidates = with_every_shape(env, candidates, target)
    return candidates


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
    env: PruningEnv, candidates: Sequence[Candidate], tokens: int, seed: int, on_progress: OnProgress | None = None
) -> tuple[list[Candidate], float | None, int]:
    """Measure candidates on the same windows and examples; best reward first, with the dense loss and tokens taken.

    A single candidate is chosen without being measured.
    """
    if len(candidates) == 1:
        return list(candidates), None, 0
    subset, examples = finals_windows(env, tokens, seed), finals_examples(env, tokens, seed)
    trials = [Trial(candidate.allocation, subset, examples) for candidate in candidates]
    outcomes = list(env.outcomes(trials, on_progress))
    measured: list[tuple[float, float, Candidate]] = []
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        loss, judged = outcome.pruned.loss, outcome.judgement
        known = replace(candidate, loss=loss, reward=judged.reward, objectives=judged.objectives)
        measured.append((-judged.reward, np.inf if judged.failed else loss, known))
    # Where losses are so large that rewards are equal, the smaller loss; what broke down comes last.
    measured.sort(key=lambda each: each[:2])
    return [c for _, _, c in measured], outcomes[0].dense.loss, sum(outcome.tokens for outcome in outcomes)


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
    return evaluate_cut(env.prunable, windows, tokens_per_batch=env.tokens_per_batch).loss
