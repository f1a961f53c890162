"""Sensitivity: measure each sublayer on its own, then make the budgeted choice that these measurements say is best.

The classical form cuts one sublayer of the dense model at a time (Li et al. 2017, arXiv 1608.08710, section 3.2), and
chooses within a budget by a price per unit of cost (Everett 1963). A vector environment cannot be asked for that: it
puts every episode on the budget. What can be measured is f_i(x) = R(m + x e_i) - R(m): sublayer i alone gets more or
less than the prior m gives it, and the projection lets all the others pay or profit, each by the same keep ratio.

That payment is what makes the budgeted choice easy. With R = sum of l_i(keep ratio i) and a price p per unit of cost,
f_i(x) = l_i(m_i + x) - l_i(m_i) - p c_i x to first order: the measured f_i is the Lagrangian of the budget, the price
included. So the maximum of the model sum of f_i(x_i) is separable, and :mod:`ffgym.agents.additive` solves it exactly.

The model holds near the prior and is blind to interactions, and every f_i has its noise. So what is left of the tokens
checks the solution x*: m + t x* for several t, the same few points on subset after subset. The best mean wins.

Every update measures m itself first, and f is a difference within one update (common random numbers). Where the tokens
allow more than one sweep over all sublayers and levels, f is a mean over subsets; where they do not allow one, the
sublayers not reached keep the prior's importance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ffgym.agents.additive import one_at_a_time, solve
from ffgym.plugins.bases import Agent, OnUpdate, PluginConfig
from ffgym.types import Update


class SensitivityConfig(PluginConfig):
    """Options of the agent."""

    levels: tuple[float, ...] = Field(
        (-0.4, 0.4),
        min_length=1,
        description="by how much a sublayer's importance is moved, in importance units (2 spans all keep ratios)",
    )
    check_share: float = Field(
        0.2, gt=0, lt=1, description="share of the tokens kept for checking the solution, in (0, 1)"
    )
    scale: float = Field(
        1.5, gt=0, description="largest t of the check, above 0; t = 0 is the prior, t = 1 the solution"
    )


class Sensitivity(Agent):
    """One-at-a-time sensitivities around the prior, an exactly solved model, a check along its solution."""

    name = "sensitivity"
    Config: ClassVar[type[PluginConfig]] = SensitivityConfig
    least_episodes = 2

    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self._solution: np.ndarray | None = None
        self._start: np.ndarray | None = None

    def learn(self, env: Any, *, seed: int, on_update: OnUpdate) -> None:
        """Sweep, solve, check."""
        self.check_updates(env.num_envs)
        measure = _Measure(env, seed, on_update)
        start = self.prior_mean if self._start is None else self._start
        prior = np.zeros(env.single_action_space.shape[0]) if start is None else start
        moves = one_at_a_time(prior, self.config.levels, np.random.default_rng(seed))
        gains = self._sweep(measure, prior, moves, keep=self.config.check_share * env.tokens_left)
        direction = solve(len(prior), moves, gains)
        scales = np.linspace(0.0, self.config.scale, env.num_envs)
        ladder = np.clip(prior + scales[:, None] * direction, -1.0, 1.0)
        totals = np.zeros(env.num_envs)
        self._solution = ladder[int(np.argmin(np.abs(scales - 1.0)))]
        while env.tokens_left > 0:
            rewards = measure(ladder)
            totals += rewards
            self._solution = ladder[int(np.argmax(totals))]
            measure.report(rewards)  # now: who listens may ask what is recommended

    def recommend(self, observation: np.ndarray) -> list[np.ndarray]:
        """The solution."""
        return [] if self._solution is None else [self._solution.astype(np.float32)]

    def state(self) -> dict[str, Any]:
        """The solution."""
        return {} if self._solution is None else {"solution": self._solution.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take another run's solution as the point to measure around."""
        self._start = np.array(state["solution"])

    def _sweep(
        self, measure: _Measure, prior: np.ndarray, moves: list[tuple[int, float]], *, keep: float
    ) -> np.ndarray:
        """Mean gain of each move over the prior, shape (moves,), NaN where the tokens did not reach it."""
        room = measure.env.num_envs - 1
        totals, counts = np.zeros(len(moves)), np.zeros(len(moves))
        position = 0
        while measure.env.tokens_left > keep and moves:
            chosen = [(position + k) % len(moves) for k in range(room)]
            position += room
            points = np.tile(prior, (room + 1, 1))
            for row, index in enumerate(chosen, start=1):
                sublayer, change = moves[index]
                points[row, sublayer] += change
            rewards = measure(points)
            np.add.at(totals, chosen, rewards[1:] - rewards[0])
            np.add.at(counts, chosen, 1)
            measure.report(rewards)
        with np.errstate(invalid="ignore"):
            return np.asarray(totals / counts)


class _Measure:
    """Steps the environment, and says so."""

    def __init__(self, env: Any, seed: int, on_update: OnUpdate) -> None:
        self.env = env
        self._on_update = on_update
        self._index = 0
        env.reset(seed=seed)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Rewards of importances, shape (num_envs, 2L) -> (num_envs,)."""
        _, rewards, _, _, _ = self.env.step(np.clip(points, -1.0, 1.0).astype(np.float32))
        return np.asarray(rewards, dtype=np.float64)

    def report(self, rewards: np.ndarray) -> None:
        """Report a step once it has been learnt from."""
        self._on_update(Update(index=self._index, rewards=rewards))
        self._index += 1
