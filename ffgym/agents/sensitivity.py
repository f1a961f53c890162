"""Sensitivity: measure each sublayer on its own, then make the budgeted choice that these measurements say is best.

The classical form cuts one sublayer of the dense model at a time (Li et al. 2017, arXiv 1608.08710, section 3.2), and
chooses within a budget by a price per unit of cost (Everett 1963). A vector environment cannot be asked for that: it
puts every episode on the budget. What can be measured is f_i(x) = R(m + x e_i) - R(m): sublayer i alone gets more or
less than the prior m gives it, and the projection lets all the others pay or profit, each by the same keep ratio.

That payment is what makes the budgeted choice easy. With R = sum of l_i(keep ratio i) and a price p per unit of cost,
f_i(x) = l_i(m_i + x) - l_i(m_i) - p c_i x to first order: the measured f_i is the Lagrangian of the budget, the price
included. So the maximum of the model sum of f_i(x_i) is separable, and is found exactly one sublayer at a time: the
vertex of the parabola through the origin that fits f_i best, where that is a maximum between the changes measured, else
the best change measured, else 0.

The model holds near the prior and is blind to interactions, and every f_i has its noise. So what is left of the tokens
checks the solution x*: m + t x* for several t, the same few points on subset after subset. The best mean wins.

Every update measures m itself first, and f is a difference within one update (common random numbers). Where the tokens
allow more than one sweep over all sublayers and levels, f is a mean over subsets; where they do not allow one, the
sublayers not reached keep the prior's importance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffgym.plugins.bases import Agent, OnUpdate, PluginConfig
from ffgym.types import Update

LEVELS = (-0.4, 0.4)  # by how much a sublayer's importance is moved (2 spans all keep ratios)
CHECK_SHARE = 0.2  # of the tokens, kept for checking the solution
LARGEST_SCALE = 1.5  # largest t of the check: 0 is the prior, 1 the solution


class Sensitivity(Agent):
    """Measures each sublayer on its own around the prior, solves the model of their sum, and checks the solution."""

    name = "sensitivity"
    least_episodes = 2

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._solution: np.ndarray | None = None

    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Sweep, solve, check."""
        self.check_updates(env.num_envs)
        env.reset(seed=seed)
        self._updates = 0
        start = self.prior_mean if self._solution is None else self._solution
        prior = np.zeros(env.single_action_space.shape[0]) if start is None else start
        moves = one_at_a_time(prior, np.random.default_rng(seed))
        gains = self._sweep(env, on_update, prior, moves)
        direction = solve(len(prior), moves, gains)
        scales = np.linspace(0.0, LARGEST_SCALE, env.num_envs)
        ladder = np.clip(prior + scales[:, None] * direction, -1.0, 1.0)
        totals = np.zeros(env.num_envs)
        self._solution = ladder[int(np.argmin(np.abs(scales - 1.0)))]
        while env.tokens_left > 0:
            rewards = self._measured(env, ladder)
            totals += rewards
            self._solution = ladder[int(np.argmax(totals))]
            self._report(on_update, rewards)  # last: a listener may ask what is recommended now

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The solution; before there is one, that of the state that was loaded."""
        return [] if self._solution is None else [self._solution.astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """The solution."""
        return {} if self._solution is None else {"solution": self._solution.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take another run's solution as the point to measure around."""
        self._solution = np.array(state["solution"])

    def _sweep(self, env: Any, on_update: OnUpdate, prior: np.ndarray, moves: list[tuple[int, float]]) -> np.ndarray:
        """Mean gain of each move over the prior, shape (moves,), NaN where the tokens did not reach it."""
        room, keep = env.num_envs - 1, CHECK_SHARE * env.tokens_left
        totals, counts = np.zeros(len(moves)), np.zeros(len(moves))
        position = 0
        while env.tokens_left > keep and moves:
            chosen = [(position + k) % len(moves) for k in range(room)]
            position += room
            points = np.tile(prior, (room + 1, 1))
            for row, index in enumerate(chosen, start=1):
                sublayer, change = moves[index]
                points[row, sublayer] += change
            rewards = self._measured(env, points)
            np.add.at(totals, chosen, rewards[1:] - rewards[0])
            np.add.at(counts, chosen, 1)
            self._report(on_update, rewards)
        with np.errstate(invalid="ignore"):
            return np.asarray(totals / counts)

    @staticmethod
    def _measured(env: Any, points: np.ndarray) -> np.ndarray:
        """Rewards of importances, shape (num_envs, 2L) -> (num_envs,)."""
        _, rewards, _, _, _ = env.step(np.clip(points, -1.0, 1.0).astype(np.float32))
        return np.asarray(rewards, dtype=np.float64)

    def _report(self, on_update: OnUpdate, rewards: np.ndarray) -> None:
        on_update(Update(index=self._updates, rewards=rewards))
        self._updates += 1


def one_at_a_time(prior: np.ndarray, rng: np.random.Generator) -> list[tuple[int, float]]:
    """What to measure: (sublayer, change) for every sublayer and level that [-1, 1] leaves room for.

    Level by level, the sublayers of each in a random order, so that a sweep that is cut short is spread over depth.

    Args:
        prior: importances to move from, shape (2L,).
    """
    moves: list[tuple[int, float]] = []
    for level in LEVELS:
        for i in rng.permutation(len(prior)):
            change = float(np.clip(prior[i] + level, -1.0, 1.0) - prior[i])
            if abs(change) > 1e-6:
                moves.append((int(i), change))
    return moves


def solve(dimensions: int, moves: list[tuple[int, float]], gains: np.ndarray) -> np.ndarray:
    """The changes that maximise the sum of all sublayers' models.

    Args:
        dimensions: 2L.
        moves: (sublayer, change).
        gains: shape (moves,); NaN = not measured.

    Returns:
        shape (2L,).
    """
    best = np.zeros(dimensions)
    for sublayer in range(dimensions):
        known = [(x, g) for (i, x), g in zip(moves, gains, strict=True) if i == sublayer and np.isfinite(g)]
        if known:
            best[sublayer] = _peak(np.array([x for x, _ in known]), np.array([g for _, g in known]))
    return best


def _peak(changes: np.ndarray, gains: np.ndarray) -> float:
    """Where a parabola through 0 and the gains peaks between the changes; else the best of them, or 0."""
    low, high = min(0.0, changes.min()), max(0.0, changes.max())
    if len(np.unique(changes)) > 1:
        slope, bend = np.linalg.lstsq(np.stack([changes, changes**2], axis=1), gains, rcond=None)[0]
        if bend < 0 and low < -slope / (2 * bend) < high:
            return float(-slope / (2 * bend))
    return float(changes[np.argmax(gains)]) if gains.max() > 0 else 0.0
